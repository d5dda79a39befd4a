"""Mask losses on sampled points (reference: mmdet CrossEntropyLoss and DiceLoss in Sa2VA)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key

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


def merged_masks(
  logits: Float[Array, "B M Y X"],
  has_mask: Bool[Array, "B M"],
  is_answer: Bool[Array, "B M"],
  merge: Literal["reference", "answers"],
) -> tuple[Float[Array, "B Y X"], Bool[Array, "B"]]:
  """The largest logit of a sample's masks at each cell, float32, and whether any mask counts.

  "answers": of the answer's masks. "reference": of all masks, those that are not the answer's with
  logits times 0, so that a sample with such a mask has no cell below 0 (Sa2VAModelGRPOv2). Where no
  mask counts the map is 0.
  """
  logits = logits.astype(jnp.float32)
  counts = has_mask if merge == "reference" else has_mask & is_answer
  logits = jnp.where(is_answer[..., None, None], logits, 0.0)
  largest = jnp.max(jnp.where(counts[..., None, None], logits, -jnp.inf), axis=1)
  any_counts = jnp.any(counts, axis=1)
  return jnp.where(any_counts[:, None, None], largest, 0.0), any_counts
