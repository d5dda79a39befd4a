"""One-to-one assignment of predicted to ground-truth masks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from vrt_jax.ops.masks import Mask, iou_matrix


def match_ious(pred_masks: Sequence[Mask], gt_masks: Sequence[Mask]) -> list[float]:
  """IoU of every ground-truth mask with its partner; 0 where it has none.

  The assignment maximises the total IoU. Masks are dense [Y X] arrays or COCO RLEs of one size;
  raises ValueError ("mask size: ...") where sizes differ. Same numbers as `calculate_miou` of the
  reference (vrt_eval_single.py).

  Examples:
    >>> box = np.array([[1, 1], [0, 0]]); full = np.ones((2, 2))
    >>> match_ious([full], [box, full])
    [0.0, 1.0]
  """
  return partner_ious(iou_matrix(pred_masks, gt_masks))


def partner_ious(ious: Float[np.ndarray, "M N"]) -> list[float]:
  """IoU of every ground-truth mask with its partner from the matrix of all IoUs."""
  matched = np.zeros(ious.shape[1])
  if ious.size:
    rows, columns = linear_sum_assignment(1 - ious)
    matched[columns] = ious[rows, columns]
  return matched.tolist()
