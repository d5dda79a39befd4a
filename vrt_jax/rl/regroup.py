"""Which groups of its rollouts a step learns from: none that are equal, those that vary most."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int32

from vrt_jax.rl.policy import GrpoBatch
from vrt_jax.runtime import batch_shardings
from vrt_jax.types import TextInputs


def equal_groups(rewards: Float[np.ndarray, "B G"]) -> Bool[np.ndarray, "B"]:
  """Groups that teach nothing, since all their samples earned the same."""
  return rewards.max(axis=1) == rewards.min(axis=1)


def refill_source(
  kept: Float[np.ndarray, "B G"], fresh: Float[np.ndarray, "B G"]
) -> Int32[np.ndarray, "B"]:
  """For each kept group the fresh one that takes its place, -1 where it stays.

  Equal groups give way to fresh ones that are not equal, both in their order:
  [[1, 1], [0, 1], [0, 0]] and [[1, 0], [1, 1], [1, 1]] -> [0, -1, -1].
  """
  source = np.full(len(kept), -1, np.int32)
  missing, good = np.flatnonzero(equal_groups(kept)), np.flatnonzero(~equal_groups(fresh))
  count = min(len(missing), len(good))
  source[missing[:count]] = good[:count]
  return source


def joined_rewards(
  kept: Float[np.ndarray, "B G"], source: Int32[np.ndarray, "B"], fresh: Float[np.ndarray, "B G"]
) -> Float[np.ndarray, "B G"]:
  """The rewards of a batch whose groups were replaced."""
  return np.where(source[:, None] >= 0, fresh[np.maximum(source, 0)], kept)


def most_varied(rewards: Float[np.ndarray, "B G"], count: int) -> Int32[np.ndarray, "N"]:
  """The `count` groups whose rewards deviate most, in their order; of equal ones the first.

  [[1, 1], [0, 1], [0, 3], [2, 1]], 2 -> [1, 2].
  """
  order = np.argsort(-rewards.std(axis=1), kind="stable")
  return np.sort(order[:count]).astype(np.int32)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def join_groups(
  kept: GrpoBatch, source: Int32[Array, "B"], fresh: GrpoBatch, *, mesh: Mesh
) -> GrpoBatch:
  """`kept` with row `source[b]` of `fresh` as row b, where that is not -1."""

  def choose(axis: int, old: Array, new: Array) -> Array:
    taken = jnp.take(new, jnp.maximum(source, 0), axis=axis)
    shape = [1] * old.ndim
    shape[axis] = len(source)
    return jnp.where((source >= 0).reshape(shape), taken, old)

  joined = _map_rows(choose, kept, fresh)
  return jax.lax.with_sharding_constraint(joined, batch_shardings(joined, mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def take_groups(batch: GrpoBatch, rows: Int32[Array, "N"], *, mesh: Mesh) -> GrpoBatch:
  """The batch of the groups `rows`, divided over the mesh."""
  taken = _map_rows(lambda axis, x: jnp.take(x, rows, axis=axis), batch)
  return jax.lax.with_sharding_constraint(taken, batch_shardings(taken, mesh))


def _map_rows(function: Callable[..., Array], *batches: GrpoBatch) -> GrpoBatch:
  """function(axis, *arrays) of the arrays of the batches, whose prompts are on `axis`."""

  def node(*nodes: Array | TextInputs) -> Array | TextInputs:
    if not isinstance(nodes[0], TextInputs):
      return function(0, *nodes)
    positions = function(1, *(x.position_ids for x in nodes))
    others = (x.replace(position_ids=x.input_ids) for x in nodes)
    return jax.tree.map(functools.partial(function, 0), *others).replace(position_ids=positions)

  return jax.tree.map(node, *batches, is_leaf=lambda x: isinstance(x, TextInputs))
