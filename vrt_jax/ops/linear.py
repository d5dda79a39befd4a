"""x W^T, in the forms in which XLA's compilers read and multiply fastest."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vrt_jax.ops.sharding import (
  ambient_mesh,
  by_device,
  devices_of_batch,
  on_one_cpu,
  on_tpu,
  platform,
  rows_by_device,
)

FEW_ROWS = 12
TPU_FEW_ROWS = 64
SUBLANES = 8


def linear(
  x: Float[Array, "*B in"], weight: Float[Array, "*out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*B_out"]:
  """x W^T in `dtype`, that of x where None; sums are float32.

  The weight of heads is [N, H, in], and the product [.., N, H]: it leaves the compiler the order in
  which attention wants it, where a TPU would copy [.., N * H] into another.

  Decoding and mask prompts multiply a few rows by large matrices, which is a matter of reading
  them. On CPUs the plain product of 2 to 12 rows reads a float32 matrix at a half of the memory's
  speed, and that of one row a bfloat16 matrix at a thirtieth. TPUs: `_few_rows_on_tpu`.
  """
  dtype = x.dtype if dtype is None else dtype
  if _is_few_on_tpu(x):
    return _few_rows_on_tpu(x, weight, dtype)
  if platform() != "cpu":
    return _plain(x, weight, dtype)
  matrix = weight.reshape(-1, weight.shape[-1])
  rows = math.prod(x.shape[:-1])
  if on_one_cpu() and 0 < rows <= FEW_ROWS:
    out = _few_rows(x.reshape(rows, -1), matrix).astype(dtype)
  elif x.dtype == weight.dtype == dtype == jnp.bfloat16:
    out = _linear_16(x, matrix)
  else:
    out = _plain(x, matrix, dtype)
  return out.reshape(*x.shape[:-1], *weight.shape[:-1])


def low_rank(x: Float[Array, "*B in"], weight: Float[Array, "*out in"]) -> Float[Array, "*B_out"]:
  """Either product of an adapter: `linear` with another gradient by the weight.

  On CPUs that of the second, whose x is narrow, is taken as (x^T g)^T: as g^T x, which is what
  differentiation gives, XLA transposes the wide g, and computes again column by column what g is
  made of. On a mesh every device sums its own rows and the sums are added: left alone, XLA's TPU
  compiler takes the few columns of one device after those of another, and reads all of g for each.
  """
  if platform() == "cpu":
    matrix = weight.reshape(-1, weight.shape[-1])
    out = _low_rank_up(x, matrix) if len(matrix) > x.shape[-1] else linear(x, matrix)
    return out.reshape(*x.shape[:-1], *weight.shape[:-1])
  if ambient_mesh() is None or _is_few_on_tpu(x):
    return linear(x, weight)
  return _summed_by_device(x, weight)


def _plain(x: Array, weight: Array, dtype: DTypeLike) -> Array:
  form = "...i,oi->...o" if weight.ndim == 2 else "...i,nhi->...nh"
  return jnp.einsum(form, x, weight, preferred_element_type=dtype)


def _is_few_on_tpu(x: Array) -> bool:
  """Whether a TPU has so few rows of its own that reading the matrix is all that counts."""
  return on_tpu() and math.prod(x.shape[:-1]) <= TPU_FEW_ROWS * devices_of_batch(x.shape[0])


def _few_rows_on_tpu(x: Array, weight: Array, dtype: DTypeLike) -> Array:
  """By a matrix without heads, which is read where it lies; a single row goes with empty ones.

  By heads XLA's TPU compiler copies the matrix first, and the product of one row it makes on the
  vector units, which do not keep up with memory. Barriers keep it from undoing either.
  """
  matrix, shape = weight.reshape(-1, weight.shape[-1]), (*x.shape[:-1], *weight.shape[:-1])
  if math.prod(x.shape[:-1]) > devices_of_batch(x.shape[0]):
    out = _plain(x, matrix, dtype)
    return out if weight.ndim == 2 else jax.lax.optimization_barrier(out).reshape(shape)
  rows = x.reshape(-1, 1, x.shape[-1])  # one a device
  rows = jax.lax.optimization_barrier(jnp.pad(rows, ((0, 0), (0, SUBLANES - 1), (0, 0))))
  out = jax.lax.optimization_barrier(_plain(rows, matrix, dtype))
  return out[:, :1].reshape(shape)


@jax.custom_vjp
def _summed_by_device(x: Array, weight: Array) -> Array:
  return _plain(x, weight, x.dtype)


def _sums_of_devices(kept: tuple[Array, Array], by_out: Array) -> tuple[Array, Array]:
  x, weight = kept
  own, by_own = rows_by_device(x), rows_by_device(by_out)
  rows = tuple(range(1, own.ndim - 1))
  sums = by_device(jax.lax.dot_general(by_own, own, ((rows, rows), ((0,), (0,)))))
  return jnp.tensordot(by_out, weight, weight.ndim - 1), jnp.sum(sums, axis=0)


_summed_by_device.defvjp(
  lambda x, weight: (_summed_by_device(x, weight), (x, weight)), _sums_of_devices
)


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
