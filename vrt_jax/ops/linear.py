"""x W^T, on CPUs in the forms in which XLA's compiler reads and multiplies fastest."""

import math
from collections.abc import Callable

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
  if platform() == "cpu" and x.dtype == weight.dtype == dtype == jnp.bfloat16:
    return _linear_16(x, weight)
  return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)


def _few_rows(x: Float[Array, "R in"], weight: Float[Array, "out in"]) -> Float[Array, "R out"]:
  """float32."""
  if x.dtype != jnp.float32:
    # XLA's fast library takes matrices alone: a single row goes with one of zeros. As the right
    # operand, rows are what it brings into another order, and not the weights.
    rows = jax.lax.optimization_barrier(jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0))))
    out = jnp.einsum("oi,ri->or", weight, rows, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out).T[: len(x)]
  if len(x) == 1:
    return jnp.einsum("ri,oi->ro", x, weight)
  columns = jax.lax.optimization_barrier(x.T)  # else the transpose is undone and weights move
  return jax.lax.optimization_barrier(weight @ columns).T


def _rounded(form: str, x: Array, y: Array) -> Array:
  """A product in the dtype of x, of float32 sums that are rounded after it.

  XLA's CPU compiler widens 16 bit arrays and multiplies in float32 where the product itself has 16
  bits; processors' instructions for them have a float32 result.
  """
  return jnp.einsum(form, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _wide_sums(x: Array, weight: Array) -> Array:
  return _rounded("...i,oi->...o", x, weight)


def _with_weight_gradient(by_weight: Callable[[Array, Array], Array]) -> Callable:
  """`_wide_sums` whose gradient by the weight is `by_weight`(rows of x, rows of the gradient)."""

  def backward(kept: tuple[Array, Array], by_out: Array) -> tuple[Array, Array]:
    x, weight = kept
    rows, by_rows = (y.reshape(-1, y.shape[-1]) for y in (x, by_out))
    return _rounded("...o,oi->...i", by_out, weight), by_weight(rows, by_rows)

  product = jax.custom_vjp(_wide_sums)
  product.defvjp(lambda x, weight: (_wide_sums(x, weight), (x, weight)), backward)
  return product


_linear_16 = _with_weight_gradient(lambda x, by_out: _rounded("no,ni->oi", by_out, x))
_low_rank_up = _with_weight_gradient(
  lambda x, by_out: jax.lax.optimization_barrier(_rounded("nr,no->ro", x, by_out)).T
)


def low_rank_up(x: Float[Array, "*B r"], weight: Float[Array, "out r"]) -> Float[Array, "*B out"]:
  """x W^T for a narrow x, the second product of an adapter.

  On CPUs the gradient by W is taken as (x^T g)^T: as g^T x, which is what differentiation gives,
  XLA transposes the wide g, and computes again column by column what g is made of.
  """
  if platform() == "cpu":
    return _low_rank_up(x, weight)
  return jnp.einsum("...r,or->...o", x, weight)
