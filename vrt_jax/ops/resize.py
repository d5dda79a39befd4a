"""Image resizing as products with small dense matrices, equal to torch's F.interpolate.

The matrices depend on static sizes alone, so they are built in numpy while tracing. Coordinates
are half-pixel (align_corners False) and nothing is low-passed (antialias False).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from vrt_jax.config import NearestMode
from vrt_jax.ops.nearest import nearest_source

BICUBIC_A = -0.75


def bilinear_matrix(in_size: int, out_size: int) -> Float[np.ndarray, "out_size in_size"]:
  """Row i holds the two weights of output sample i; samples outside repeat the border."""
  source = np.maximum((np.arange(out_size) + 0.5) * in_size / out_size - 0.5, 0.0)
  low = np.minimum(np.floor(source).astype(int), in_size - 1)
  high = np.minimum(low + 1, in_size - 1)
  matrix = np.zeros((out_size, in_size))
  rows = np.arange(out_size)
  np.add.at(matrix, (rows, low), 1.0 - (source - low))
  np.add.at(matrix, (rows, high), source - low)
  return matrix.astype(np.float32)


def bicubic_matrix(in_size: int, out_size: int) -> Float[np.ndarray, "out_size in_size"]:
  """Row i holds the four Keys weights (a = -0.75) of output sample i, borders repeated."""
  source = (np.arange(out_size) + 0.5) * in_size / out_size - 0.5
  base = np.floor(source).astype(int)
  matrix = np.zeros((out_size, in_size))
  rows = np.arange(out_size)
  for tap in range(-1, 3):
    t = np.abs(source - (base + tap))
    near = (BICUBIC_A + 2) * t**3 - (BICUBIC_A + 3) * t**2 + 1
    far = BICUBIC_A * (t**3 - 5 * t**2 + 8 * t - 4)
    weight = np.where(t <= 1, near, far)
    np.add.at(matrix, (rows, np.clip(base + tap, 0, in_size - 1)), weight)
  return matrix.astype(np.float32)


def _apply(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
  precision = jax.lax.Precision.HIGHEST
  y = jnp.einsum("yi,...ij->...yj", rows, x.astype(jnp.float32), precision=precision)
  y = jnp.einsum("...yj,xj->...yx", y, columns, precision=precision)
  return y.astype(x.dtype)


def resize_bilinear(x: Float[Array, "*B Y X"], size: tuple[int, int]) -> Float[Array, "*B Yo Xo"]:
  """`F.interpolate(x, size, mode="bilinear", align_corners=False)`; float32 inside.

  `size` is (rows, columns). The result has the dtype of `x`.
  """
  return _apply(x, bilinear_matrix(x.shape[-2], size[0]), bilinear_matrix(x.shape[-1], size[1]))


def resize_bicubic(x: Float[Array, "*B Y X"], size: tuple[int, int]) -> Float[Array, "*B Yo Xo"]:
  """`F.interpolate(x, size, mode="bicubic", align_corners=False)`; float32 inside.

  `size` is (rows, columns). The result has the dtype of `x`.
  """
  return _apply(x, bicubic_matrix(x.shape[-2], size[0]), bicubic_matrix(x.shape[-1], size[1]))


def resize_nearest_numpy(
  mask: Shaped[np.ndarray, "*B Y X"], size: tuple[int, int], mode: NearestMode = "nearest"
) -> Shaped[np.ndarray, "*B Yo Xo"]:
  """`F.interpolate(mask, size, mode=mode)` on the host, see `nearest_source`."""
  rows = nearest_source(mask.shape[-2], size[0], mode)
  columns = nearest_source(mask.shape[-1], size[1], mode)
  return mask[..., rows[:, None], columns]


def resize_bilinear_numpy(
  x: Float[np.ndarray, "*B Y X"], size: tuple[int, int]
) -> Float[np.ndarray, "*B Yo Xo"]:
  """`resize_bilinear` on the host, with two taps a sample instead of a matrix; float32.

  For picture sizes, which differ from sample to sample and would each compile a program.
  """

  def taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source = np.maximum((np.arange(out_size) + 0.5) * in_size / out_size - 0.5, 0.0)
    low = np.minimum(np.floor(source).astype(int), in_size - 1)
    return low, np.minimum(low + 1, in_size - 1), (source - low).astype(np.float32)

  x = x.astype(np.float32)
  low, high, weight = taps(x.shape[-2], size[0])
  weight = weight[:, None]
  x = x[..., low, :] * (1 - weight) + x[..., high, :] * weight
  low, high, weight = taps(x.shape[-1], size[1])
  return x[..., low] * (1 - weight) + x[..., high] * weight
