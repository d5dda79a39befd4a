"""One SFT update: text cross-entropy plus mask losses on every sample's [SEG]."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from vrt_jax.config import OptimConfig, Remat, SftLossConfig
from vrt_jax.losses.mask import mask_losses
from vrt_jax.losses.token import cross_entropy
from vrt_jax.ops.sharding import on_mesh
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.types import IGNORE_INDEX, Batch

Metrics = dict[str, Array]
LOSS_PARTS = ("loss", "loss/text", "loss/mask_bce", "loss/mask_dice")


def sft_loss(
  trainable: nnx.State,
  frozen: Frozen,
  batch: Batch,
  key: Array,
  totals: tuple[Array, Array],
  config: SftLossConfig,
  remat: Remat,
) -> tuple[Array, Metrics]:
  """Weighted loss of a (part of a) batch, normalised by the whole batch's `totals`.

  loss = text CE / labelled tokens + 2.0 BCE + 0.5 dice per mask (weights from the config).
  """
  model = frozen.merge(trainable)
  dropout_key, point_key = jax.random.split(key)
  out = model(batch, dropout_key=dropout_key, remat=remat)
  head = model.qwen.language_model.head_weight()
  ce, _ = cross_entropy(out.hidden_states, head, batch.targets.labels)
  bce, dice, _ = mask_losses(
    point_key, out.masks.low_res_masks, batch.targets.masks, batch.targets.seg_valid, config
  )
  num_tokens, num_masks = totals
  parts = {
    "loss/text": ce / jnp.maximum(num_tokens, 1.0),
    "loss/mask_bce": bce / (num_masks + 1e-4 / config.num_points),
    "loss/mask_dice": dice / (num_masks + 1e-4),
  }
  loss = (
    config.text_weight * parts["loss/text"]
    + config.bce_weight * parts["loss/mask_bce"]
    + config.dice_weight * parts["loss/mask_dice"]
  )
  return loss, {"loss": loss, **parts}


def split_batch(batch: Batch, parts: int) -> Batch:
  """[B, ..] -> [parts, B / parts, ..] in every array (position_ids keep their leading 3).

  Part i has the rows i, i + parts, i + 2 parts, ..: every device keeps its rows.
  """

  def split(x: Array, axis: int = 0) -> Array:
    shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

  position_ids = split(batch.text.position_ids, axis=1)
  rest = batch.replace(text=batch.text.replace(position_ids=batch.text.input_ids))
  rest = jax.tree.map(split, rest)
  return rest.replace(text=rest.text.replace(position_ids=position_ids))


def sft_gradients(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  key: Array,
  optim: OptimConfig,
  loss: SftLossConfig,
) -> tuple[nnx.State, Metrics]:
  """Gradients and loss parts of a batch, computed in optim.accumulation_steps equal parts."""
  num_tokens = jnp.sum(batch.targets.labels[:, 1:] != IGNORE_INDEX).astype(jnp.float32)
  num_masks = jnp.sum(batch.targets.seg_valid).astype(jnp.float32)

  def part(part_batch: Batch, part_key: Array) -> tuple[nnx.State, Metrics]:
    return jax.grad(sft_loss, has_aux=True)(
      state.trainable, frozen, part_batch, part_key, (num_tokens, num_masks), loss, optim.remat
    )

  if optim.accumulation_steps == 1:
    return part(batch, key)
  parts = split_batch(batch, optim.accumulation_steps)
  keys = jax.random.split(key, optim.accumulation_steps)
  zeros = (
    jax.tree.map(jnp.zeros_like, state.trainable),
    {name: jnp.zeros(()) for name in LOSS_PARTS},
  )
  sums, _ = jax.lax.scan(
    lambda carry, xs: (jax.tree.map(jnp.add, carry, part(*xs)), None), zeros, (parts, keys)
  )
  return sums


def keep_if_finite(ok: Array, new: TrainState, old: TrainState) -> TrainState:
  """`new` where `ok`, else a skipped step: `old` with one more step and one more skipped.

  A skipped step keeps parameters, moments and the moments' counter, bit for bit. Data, random
  numbers and the learning rate go on, so the schedule's counter advances too.
  """

  def choose(a: Array, b: Array) -> Array:
    return jnp.where(ok, a, b)

  def is_schedule(x: object) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)

  opt_state = jax.tree.map(
    lambda a, b: a if is_schedule(a) else choose(a, b),
    new.opt_state,
    old.opt_state,
    is_leaf=is_schedule,
  )
  trainable = jax.tree.map(choose, new.trainable, old.trainable)
  return TrainState(new.step, trainable, opt_state, old.skipped + jnp.where(ok, 0, 1))


def make_sft_step(
  optimizer: optax.GradientTransformation,
  optim: OptimConfig,
  loss: SftLossConfig,
  like: TrainState,
) -> Callable[[TrainState, Frozen, Batch, Array], tuple[TrainState, Metrics]]:
  """The jitted step: (state, frozen, batch, key) -> (state, metrics).

  `state` is donated; the new one is placed on the devices like the state `like`. Where loss or
  gradient is not finite the step is skipped, see `keep_if_finite`.
  """
  placement = jax.tree.map(lambda x: x.sharding, like)
  mesh = like.step.sharding.mesh.abstract_mesh

  @partial(jax.jit, donate_argnums=0, out_shardings=(placement, like.step.sharding))
  def sft_step(
    state: TrainState, frozen: Frozen, batch: Batch, key: Array
  ) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(key, state.step)
    with on_mesh(mesh):
      grads, metrics = sft_gradients(state, frozen, batch, key, optim, loss)
    grad_norm = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    updated = TrainState(state.step + 1, trainable, opt_state, state.skipped)
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    state = keep_if_finite(ok, updated, state)
    metrics |= {
      "grad_norm": grad_norm,
      "tokens": jnp.sum(batch.text.token_mask).astype(jnp.float32),
      "skipped_steps": state.skipped.astype(jnp.float32),
    }
    return state, metrics

  return sft_step
