"""One SFT update: text cross-entropy plus mask losses on every sample's [SEG]."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from vrt_jax.config import OptimConfig, Remat, SftLossConfig
from vrt_jax.losses.mask import mask_losses
from vrt_jax.losses.token import cross_entropy
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.update import Metrics, Step, accumulate, make_step, remat_of
from vrt_jax.types import IGNORE_INDEX, Batch


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

  remat = remat_of(optim, batch.targets.labels.shape[1])

  def part(part_batch: Batch, part_key: Array) -> tuple[nnx.State, Metrics]:
    return jax.grad(sft_loss, has_aux=True)(
      state.trainable, frozen, part_batch, part_key, (num_tokens, num_masks), loss, remat
    )

  grads, metrics = accumulate(part, state.trainable, batch, key, optim.accumulation_steps)
  return grads, {name: jnp.sum(values) for name, values in metrics.items()}


def make_sft_step(
  optimizer: optax.GradientTransformation,
  optim: OptimConfig,
  loss: SftLossConfig,
  like: TrainState,
) -> Step[Batch]:
  """The jitted step: (state, frozen, batch, key) -> (state, metrics), see `update.make_step`."""

  def gradients(
    state: TrainState, frozen: Frozen, batch: Batch, key: Array
  ) -> tuple[nnx.State, Metrics]:
    grads, metrics = sft_gradients(state, frozen, batch, key, optim, loss)
    return grads, metrics | {"tokens": jnp.sum(batch.text.token_mask).astype(jnp.float32)}

  return make_step(optimizer, gradients, like)
