"""Mask losses on sampled points (reference: mmdet CrossEntropyLoss and DiceLoss in Sa2VA)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from vrt_jax.config import SftLossConfig
from vrt_jax.ops.points import point_sample, uncertain_points


def point_bce(
  logits: Float[Array, "R Q"], targets: Float[Array, "R Q"], valid: Float[Array, "R"]
) -> Float[Array, ""]:
  """Sum over valid masks of the mean over points of the binary cross-entropy, float32."""
  loss = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
  return jnp.sum(jnp.mean(loss, axis=-1) * valid)


def point_dice(
  logits: Float[Array, "R Q"], targets: Float[Array, "R Q"], valid: Float[Array, "R"]
) -> Float[Array, ""]:
  """Sum over valid masks of 1 - (2 sum(p t) + 1) / (sum p + sum t + 1), p = sigmoid(logits)."""
  probs = jax.nn.sigmoid(logits)
  overlap = 2 * jnp.sum(probs * targets, axis=-1) + 1
  total = jnp.sum(probs, axis=-1) + jnp.sum(targets, axis=-1) + 1
  return jnp.sum((1 - overlap / total) * valid)


def mask_losses(
  key: Key[Array, ""],
  logits: Float[Array, "B M Y X"],
  masks: Array,
  valid: Array,
  config: SftLossConfig,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
  """(sum of BCE, sum of dice, number of valid masks) at uncertain points; float32 inside.

  `masks` [B, M, Y, X] in {0, 1} and `valid` [B, M] are the targets. The reference divides BCE by
  (masks * points + 1e-4) and dice by (masks + 1e-4); the sums here are already means over points.
  """
  rows = logits.shape[0] * logits.shape[1]
  flat = logits.astype(jnp.float32).reshape(rows, *logits.shape[2:])
  truth = masks.astype(jnp.float32).reshape(rows, *masks.shape[2:])
  weights = valid.reshape(rows).astype(jnp.float32)
  points = uncertain_points(
    key, flat, config.num_points, config.oversample_ratio, config.importance_share
  )
  at_points = point_sample(flat, points)
  truth_at_points = point_sample(truth, points)
  return (
    point_bce(at_points, truth_at_points, weights),
    point_dice(at_points, truth_at_points, weights),
    jnp.sum(weights),
  )
