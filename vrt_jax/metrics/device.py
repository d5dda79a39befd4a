"""IoU, matching and rewards on the device, for padded sets of masks: jit and vmap them.

The numbers are those of `vrt_jax.ops.masks.iou_matrix`, `vrt_jax.metrics.match_ious` and
`vrt_jax.rl.rewards`, within float32's rounding. Where several assignments have the same total IoU,
the partners may differ from scipy's; the total does not.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float
from optax.assignment import hungarian_algorithm

from vrt_jax.metrics.summary import HIT_IOU


def iou_matrix(
  pred: Bool[Array, "M Y X"],
  gt: Bool[Array, "N Y X"],
  pred_valid: Bool[Array, "M"],
  gt_valid: Bool[Array, "N"],
) -> Float[Array, "M N"]:
  """IoU of every predicted with every true mask, float32; 0 for an empty union or padding.

  Pixels are counted exactly in masks of up to 2^24 pixels.
  """
  exact = {"preferred_element_type": jnp.float32}
  shared = jnp.einsum("myx,nyx->mn", pred.astype(jnp.bfloat16), gt.astype(jnp.bfloat16), **exact)
  areas = [jnp.sum(masks, axis=(1, 2), dtype=jnp.float32) for masks in (pred, gt)]
  union = areas[0][:, None] + areas[1][None, :] - shared
  valid = pred_valid[:, None] & gt_valid[None, :]
  return jnp.where(valid & (union > 0), shared / jnp.maximum(union, 1.0), 0.0)


def match_ious(
  ious: Float[Array, "M N"], pred_valid: Bool[Array, "M"], gt_valid: Bool[Array, "N"]
) -> Float[Array, "N"]:
  """IoU of every true mask with its partner, 0 where it has none; maximises the total IoU.

  `ious` as of `iou_matrix`. Padding costs as much as a pair of IoU 0, so it changes no total.
  """
  ious = jnp.where(pred_valid[:, None] & gt_valid[None, :], ious, 0.0)
  if not ious.size:
    return jnp.zeros(ious.shape[1])
  rows, columns = hungarian_algorithm(1.0 - ious)
  return jnp.zeros(ious.shape[1]).at[columns].set(ious[rows, columns])


def matched_reward(
  ious: Float[Array, "M N"],
  pred_valid: Bool[Array, "M"],
  gt_valid: Bool[Array, "N"],
  penalty: float = 0.1,
) -> Float[Array, ""]:
  """`answer_reward` (and `trace_reward`) with true matching, from the IoUs of one role's masks.

  Mean IoU of the pairs over 0.5 minus `penalty` for each unpaired mask of either side; 0 where
  there is no such pair.
  """
  values = match_ious(ious, pred_valid, gt_valid)
  good = values > HIT_IOU
  count = jnp.sum(good)
  spare = jnp.sum(pred_valid) + jnp.sum(gt_valid) - 2 * count
  mean = jnp.sum(jnp.where(good, values, 0.0)) / jnp.maximum(count, 1)
  return jnp.where(count > 0, mean - penalty * spare, 0.0)
