"""Arrays in place of shapes: random weights, and batches in which every slot holds something."""

import math
import zlib
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from vrt_jax.types import IGNORE_INDEX

SMALL = 2**20
"""Elements up to which an array is one number: drawing compiles a program for each shape."""
FULL = dict.fromkeys(("token_mask", "prompt_mask", "seg_valid", "best_valid", "patch_segments"), 1)
"""Values of the integers that say what counts; others are 0."""


def filled(tree: object, *, visual_tokens: int, labelled: int, new_tokens: int) -> object:
  """A tree of shapes with shardings -> arrays.

  Samples have `visual_tokens` at their start, `labelled` tokens at their end are predicted, and
  completions have `new_tokens`.
  """
  last: dict[str, Callable[[int], np.ndarray]] = {
    "visual_index": lambda n: np.where(np.arange(n) < visual_tokens, np.arange(n), -1),
    "labels": lambda n: np.where(np.arange(n) >= n - labelled, 1, IGNORE_INDEX),
    "position_ids": np.arange,
    "lengths": lambda n: np.full(n, new_tokens),
  }

  def array(path: tuple, x: jax.ShapeDtypeStruct) -> Array:
    name = getattr(path[-1], "name", "") if path else ""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      keys = jax.random.split(jax.random.key(0), math.prod(x.shape)).reshape(x.shape)
      return jax.device_put(keys, x.sharding)
    if jnp.issubdtype(x.dtype, jnp.floating) and math.prod(x.shape) > SMALL:
      return _drawn(x.shape, x.dtype, x.sharding)(jax.random.key(zlib.crc32(str(path).encode())))
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.device_put(np.full(x.shape, 0.02, x.dtype), x.sharding)
    if x.dtype == jnp.uint8:  # pictures and masks
      value = np.random.default_rng(0).integers(0, 2, x.shape)
    else:
      value = last[name](x.shape[-1]) if name in last else FULL.get(name, 0)
    return jax.device_put(np.broadcast_to(value, x.shape).astype(x.dtype), x.sharding)

  return jax.tree_util.tree_map_with_path(array, tree)


@cache
def _drawn(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable:
  def draw(key: Array) -> Array:
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)

  return jax.jit(draw, out_shardings=sharding)
