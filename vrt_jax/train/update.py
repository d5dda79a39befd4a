"""What every training step does: gradients in parts, the optimiser, steps that are skipped."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from vrt_jax.config import OptimConfig, Remat
from vrt_jax.ops.sharding import on_mesh
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.types import TextInputs

T = TypeVar("T")
Metrics = dict[str, Array]
Gradients = Callable[[TrainState, Frozen, T, Array], tuple[nnx.State, Metrics]]
Step = Callable[[TrainState, Frozen, T, Array], tuple[TrainState, Metrics]]


def split_batch(batch: T, parts: int) -> T:
  """[B, ..] -> [parts, B / parts, ..] in every array of a tree (position_ids keep their leading 3).

  Part i has the rows i, i + parts, i + 2 parts, ..: every device keeps its rows.
  """

  def split(x: Array, axis: int = 0) -> Array:
    shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

  def split_node(x: Array | TextInputs) -> Array | TextInputs:
    if not isinstance(x, TextInputs):
      return split(x)
    rest = jax.tree.map(split, x.replace(position_ids=x.input_ids))
    return rest.replace(position_ids=split(x.position_ids, axis=1))

  return jax.tree.map(split_node, batch, is_leaf=lambda x: isinstance(x, TextInputs))


def remat_of(optim: OptimConfig, tokens: int) -> Remat:
  """What text layers compute again for sequences of `tokens`."""
  return "full" if 0 < optim.full_remat_tokens <= tokens else optim.remat


def accumulate(
  part: Callable[[T, Array], tuple[nnx.State, Metrics]],
  trainable: nnx.State,
  batch: T,
  key: Array,
  parts: int,
) -> tuple[nnx.State, Metrics]:
  """The sum of the gradients of `parts` equal parts, computed one after the other.

  `part` gives the gradients and metrics of a part and its key; metrics come out as [parts].
  """
  if parts == 1:
    grads, metrics = part(batch, key)
    return grads, {name: value[None] for name, value in metrics.items()}

  def add(total: nnx.State, xs: tuple[T, Array]) -> tuple[nnx.State, Metrics]:
    grads, metrics = part(*xs)
    return jax.tree.map(jnp.add, total, grads), metrics

  zeros = jax.tree.map(jnp.zeros_like, trainable)
  return jax.lax.scan(add, zeros, (split_batch(batch, parts), jax.random.split(key, parts)))


def make_step(
  optimizer: optax.GradientTransformation, gradients: Gradients[T], like: TrainState
) -> Step[T]:
  """The jitted step of a kind of training: (state, frozen, batch, key) -> (state, metrics).

  `gradients` gives gradients and metrics, "loss" among them, of a batch and the step's own key.
  `state` is donated; the new one is placed on the devices like the state `like`. Where loss or
  gradient is not finite the step is skipped, see `keep_if_finite`.
  """
  placement = jax.tree.map(lambda x: x.sharding, like)
  everywhere = like.step.sharding
  assert isinstance(everywhere, NamedSharding)  # as `create_state` places it
  mesh = everywhere.mesh.abstract_mesh

  @partial(jax.jit, donate_argnums=0, out_shardings=(placement, everywhere))
  def step(state: TrainState, frozen: Frozen, batch: T, key: Array) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(key, state.step)
    with on_mesh(mesh):
      grads, metrics = gradients(state, frozen, batch, key)
    state, grad_norm = apply_update(optimizer, state, grads, metrics["loss"])
    metrics |= {"grad_norm": grad_norm, "skipped_steps": state.skipped.astype(jnp.float32)}
    return state, metrics

  return step


def apply_update(
  optimizer: optax.GradientTransformation, state: TrainState, grads: nnx.State, loss: Array
) -> tuple[TrainState, Array]:
  """The state after a step, and the norm of the gradient.

  Where loss or gradient is not finite the step is skipped, see `keep_if_finite`.
  """
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  updated = TrainState(state.step + 1, trainable, opt_state, state.skipped)
  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  return keep_if_finite(ok, updated, state), grad_norm


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
