"""Sampling maps at points, and the choice of uncertain points (PointRend, arXiv 1912.08193)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key


def point_sample(maps: Float[Array, "R Y X"], points: Float[Array, "R Q 2"]) -> Float[Array, "R Q"]:
  """Bilinear values of maps at points (x, y) in [0, 1]^2, zero outside.

  Equal to torch's grid_sample(maps, 2 * points - 1, align_corners=False, padding_mode="zeros").
  """
  height, width = maps.shape[-2:]
  x = points[..., 0] * width - 0.5
  y = points[..., 1] * height - 0.5
  x0, y0 = jnp.floor(x), jnp.floor(y)
  flat = maps.reshape(maps.shape[0], height * width)

  def corner(cy: Array, cx: Array, weight: Array) -> Array:
    inside = (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
    index = jnp.where(inside, cy * width + cx, 0).astype(jnp.int32)
    return jnp.where(inside, weight, 0.0) * jnp.take_along_axis(flat, index, axis=1)

  wx, wy = x - x0, y - y0
  return (
    corner(y0, x0, (1 - wy) * (1 - wx))
    + corner(y0, x0 + 1, (1 - wy) * wx)
    + corner(y0 + 1, x0, wy * (1 - wx))
    + corner(y0 + 1, x0 + 1, wy * wx)
  )


def uncertain_points(
  key: Key[Array, ""],
  logits: Float[Array, "R Y X"],
  num_points: int,
  oversample_ratio: float,
  importance_share: float,
) -> Float[Array, "R Q 2"]:
  """Points (x, y) in [0, 1]^2 at which the mask losses look, without gradient.

  Of num_points * oversample_ratio uniform points the num_points * importance_share with the
  smallest |logit| are kept, the rest is uniform (mmdet get_uncertain_point_coords_with_randomness).
  """
  rows = logits.shape[0]
  oversampled = int(num_points * oversample_ratio)
  num_uncertain = int(num_points * importance_share)
  key_over, key_rest = jax.random.split(key)
  candidates = jax.random.uniform(key_over, (rows, oversampled, 2))
  uncertainty = -jnp.abs(point_sample(jax.lax.stop_gradient(logits), candidates))
  _, best = jax.lax.top_k(uncertainty, num_uncertain)
  kept = jnp.take_along_axis(candidates, best[..., None], axis=1)
  rest = jax.random.uniform(key_rest, (rows, num_points - num_uncertain, 2))
  return jnp.concatenate([kept, rest], axis=1)
