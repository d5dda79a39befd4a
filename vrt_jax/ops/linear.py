"""x W^T, for few rows in the form in which XLA's CPU compiler reads the weights fastest."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vrt_jax.ops.sharding import on_one_cpu

FEW_ROWS = 12


def linear(
  x: Float[Array, "*B in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*B out"]:
  """x W^T in `dtype`, that of x where None; sums are float32.

  Decoding and mask prompts multiply a few rows by large matrices, which is a matter of reading
  them. On CPUs the plain product of 2 to 12 rows reads a float32 matrix at a third of the
  memory's speed and a bfloat16 one at a tenth.
  """
  dtype = x.dtype if dtype is None else dtype
  rows = math.prod(x.shape[:-1])
  if on_one_cpu() and 0 < rows <= FEW_ROWS:
    out = _few_rows(x.reshape(rows, -1), weight)
    return out.reshape(*x.shape[:-1], -1).astype(dtype)
  return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)


def _few_rows(x: Float[Array, "R in"], weight: Float[Array, "out in"]) -> Float[Array, "R out"]:
  """float32."""
  if x.dtype != jnp.float32:
    if len(x) > 1:
      return jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)
    return jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)[None]
  if len(x) == 1:
    return jnp.einsum("ri,oi->ro", x, weight)
  columns = jax.lax.optimization_barrier(x.T)  # else the transpose is undone and weights move
  return jax.lax.optimization_barrier(weight @ columns).T
