"""Random bits for dropout: on TPUs from the chip's own generator, elsewhere by JAX's.

JAX's Threefry takes some 140 integer operations a word, which on a TPU is about a sixth of a
fine-tuning step of the 4B model; the generator of the hardware takes next to none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Key

from vrt_jax.ops.sharding import ambient_mesh, batch_axes, on_tpu, rows_per_device


def random_bits(
  key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike, then: Callable[[Array], Array]
) -> Array:
  """`then`(bits [B, ..] of an unsigned dtype), for a `then` that treats every element by itself.

  A row's bits depend on the key and the row's index alone: they are the same however a mesh divides
  the rows, of which every device draws its own. On TPUs one row after the other, so that its bits
  need not leave the fast memory.
  """
  if not on_tpu():
    return then(jax.random.bits(key, shape, dtype))
  return _by_row(key, shape, dtype, then)


def _by_row(
  key: Array, shape: tuple[int, ...], dtype: DTypeLike, then: Callable[[Array], Array]
) -> Array:
  """By XLA's RngBitGenerator, whose output the compiler could not divide."""
  mesh, rows = ambient_mesh(), rows_per_device(shape[0])
  axes = None if mesh is None else batch_axes(mesh, shape[0])

  def row(key: Array, index: Array) -> Array:
    halves = [jax.random.key_data(jax.random.fold_in(key, index))] * 2
    own = jax.random.wrap_key_data(jnp.concatenate(halves), impl="rbg")
    return then(jax.random.bits(own, shape[1:], dtype))

  def own_rows(key: Array, first: Array | int = 0) -> Array:
    return jax.lax.map(lambda index: row(key, index), first + jnp.arange(rows))

  if axes is None:
    return own_rows(key)
  return jax.shard_map(
    lambda key: own_rows(key, jax.lax.axis_index(axes) * rows),
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(axes),
    check_vma=False,
  )(key)
