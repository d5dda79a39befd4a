"""x W^T, for few rows in the form in which XLA's CPU compiler reads the weights fastest."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vrt_jax.ops.sharding import on_one_cpu, platform

FEW_ROWS = 12


def linear(
  x: Float[Array, "*B in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*B out"]:
  """x W^T in `dtype`, that of x where None; sums are float32.

  Decoding and mask prompts multiply a few rows by large matrices, which is a matter of reading
  them. On CPUs the plain product of 2 to 12 rows reads a float32 matrix at a half of the memory's
  speed, and that of one row a bfloat16 matrix at a thirtieth.
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
    # XLA's fast library takes matrices alone: a single row goes with one of zeros
    rows = jax.lax.optimization_barrier(jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0))))
    return jnp.einsum("ri,oi->ro", rows, weight, preferred_element_type=jnp.float32)[: len(x)]
  if len(x) == 1:
    return jnp.einsum("ri,oi->ro", x, weight)
  columns = jax.lax.optimization_barrier(x.T)  # else the transpose is undone and weights move
  return jax.lax.optimization_barrier(weight @ columns).T


def low_rank_up(x: Float[Array, "*B r"], weight: Float[Array, "out r"]) -> Float[Array, "*B out"]:
  """x W^T for a narrow x, the second product of an adapter.

  On CPUs the gradient by W is taken as (x^T g)^T: as g^T x, which is what differentiation gives,
  XLA transposes the wide g, and computes again column by column what g is made of.
  """
  product = _low_rank_up if platform() == "cpu" else _widened
  return product(x, weight)


def _widened(x: Array, weight: Array) -> Array:
  return jnp.einsum("...r,or->...o", x, weight)


def _low_rank_up_backward(kept: tuple[Array, Array], by_out: Array) -> tuple[Array, Array]:
  x, weight = kept
  rows, by_rows = (y.reshape(-1, y.shape[-1]) for y in (x, by_out))
  by_weight = jax.lax.optimization_barrier(jnp.einsum("nr,no->ro", rows, by_rows))
  return jnp.einsum("...o,or->...r", by_out, weight), by_weight.T


_low_rank_up = jax.custom_vjp(_widened)
_low_rank_up.defvjp(lambda x, weight: (_widened(x, weight), (x, weight)), _low_rank_up_backward)
