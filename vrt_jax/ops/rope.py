"""Rotary position embeddings: interleaved M-RoPE for text, row and column rotation for vision.

Angles, cosines and sines are float32 and cover half of a head: entry i rotates the pair
(x[i], x[i + H/2]).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

from vrt_jax.ops.sharding import on_tpu

VISION_THETA = 1e4


def _inverse_frequencies(dim: int, theta: float) -> np.ndarray:
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return np.float32(1) / np.float32(theta) ** exponents


def mrope_axes(mrope_section: tuple[int, int, int]) -> np.ndarray:
  """Which of (time, row, column) turns each frequency, shape (H/2,).

  Rows take frequencies 1, 4, .. and columns 2, 5, .. until their section is full, time all others.

  >>> mrope_axes((3, 1, 1))
  array([0, 1, 2, 0, 0])
  """
  frequency = np.arange(sum(mrope_section))
  axes = np.zeros_like(frequency)
  for axis in (1, 2):
    axes[(frequency % 3 == axis) & (frequency < 3 * mrope_section[axis])] = axis
  return axes


def mrope_cos_sin(
  position_ids: Int32[Array, "3 B T"],
  head_dim: int,
  theta: float,
  mrope_section: tuple[int, int, int],
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
  """Cosines and sines of interleaved M-RoPE, float32 (HF Qwen3VLTextRotaryEmbedding).

  Raises ValueError where the sections do not sum to head_dim / 2.
  """
  if 2 * sum(mrope_section) != head_dim:
    raise ValueError(f"mrope_section {mrope_section} must sum to head_dim / 2 = {head_dim / 2}")
  positions = position_ids[mrope_axes(mrope_section)].astype(jnp.float32)  # [H/2, B, T]
  angles = jnp.moveaxis(positions, 0, -1) * _inverse_frequencies(head_dim, theta)
  return jnp.cos(angles), jnp.sin(angles)


def vision_cos_sin(
  positions: Int32[Array, "B P 2"], head_dim: int
) -> tuple[Float[Array, "B P half"], Float[Array, "B P half"]]:
  """Cosines and sines of the 2-D rope, float32 (HF Qwen3VLVisionRotaryEmbedding).

  The first quarter of a head follows the row, the second the column.
  """
  frequencies = _inverse_frequencies(head_dim // 2, VISION_THETA)
  angles = positions.astype(jnp.float32)[..., None] * frequencies  # [B, P, 2, H/4]
  angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
  x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
  """Rotates the pairs (x[i], x[i + H/2]) of every head, in float32; the dtype of x is kept."""
  if on_tpu():
    return _by_product(x, cos, sin)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]  # [B, T, 1, H/2]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def _by_product(x: Array, cos: Array, sin: Array) -> Array:
  """The same with (-x[i + H/2], x[i]) from a product with a matrix of 0, 1 and -1, which is exact.

  Halves of a head fill a half of a TPU's lanes, and are padded to all of them in memory; matrix
  units are free at that time.
  """
  half = x.shape[-1] // 2
  swap = np.zeros((2 * half, 2 * half), np.float32)
  swap[np.arange(half) + half, np.arange(half)] = -1
  swap[np.arange(half), np.arange(half) + half] = 1
  turned = jnp.einsum(
    "btnh,hj->btnj",
    x,
    swap.astype(x.dtype),
    precision="highest" if x.dtype == jnp.float32 else None,  # else factors have 8 bits
    preferred_element_type=jnp.float32,
  )
  cos, sin = (jnp.concatenate([y, y], axis=-1)[:, :, None] for y in (cos, sin))
  return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
