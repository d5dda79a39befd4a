"""The two rewards of GRPO: does the text have the form, do the answer masks fit.

Source: `format_rewards_v2`, `answer_rewards_v3` and `MaskMatcher` of sa2va_grpo.py.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import linear_sum_assignment
from scipy.special import expit

from vrt_jax.ops.resize import resize_nearest_numpy

COUNT_PENALTY = 0.1
HIT_IOU = 0.5
IOU_EPS = 1e-6

_ANSWER_FORM = ("<answer>", "[SEG]", "</answer>")
_THINK_AND_ANSWER = ("[SEG]", "</think>", *_ANSWER_FORM)
_ANSWER_ONLY = ("</think>", *_ANSWER_FORM)


def format_reward(text: str) -> float:
  """1.0 for `<think>..[SEG]..</think>..<answer>..[SEG]..</answer>..`, 0.5 without the first [SEG].

  The text must start with `<think>`; anything may follow `</answer>`. Otherwise 0.0. The marks are
  searched left to right, which accepts what a lazy regular expression accepts, in linear time.
  """
  if not text.startswith("<think>"):
    return 0.0
  if _has_in_order(text, _THINK_AND_ANSWER):
    return 1.0
  return 0.5 if _has_in_order(text, _ANSWER_ONLY) else 0.0


def answer_reward(
  mask_logits: Float[np.ndarray, "M Y X"] | None,
  gt_masks: Shaped[np.ndarray, "N H W"],
  answer_indices: Sequence[int],
  matching: Literal["hungarian", "reference"] = "hungarian",
) -> float:
  """Mean IoU of the good pairs - 0.1 * (unpaired answer masks + unpaired ground-truth masks).

  `mask_logits` holds one mask a [SEG] (None: no mask), of which `answer_indices` are the answer's;
  indices without a mask are left out. Ground truth (0/1) is resized to the logits' size with
  nearest neighbours. A pair is good where its IoU > 0.5; without one the reward is 0.
  "hungarian" maximises the total IoU; "reference" looks only at the pair (0, 0) where either side
  has one mask, as the reference does. Raises ValueError for another `matching`.
  """
  if matching not in ("hungarian", "reference"):
    raise ValueError(f"matching: {matching!r} is not one of hungarian, reference")
  if mask_logits is None:
    return 0.0
  logits = np.asarray(mask_logits, np.float32)
  indices = [i for i in answer_indices if 0 <= i < len(logits)]
  if not indices or len(gt_masks) == 0:
    return 0.0
  pred = expit(logits[indices]) > 0.5
  ious = _ious_with_eps(pred, resize_nearest_numpy(np.asarray(gt_masks), logits.shape[-2:]))
  if matching == "reference" and 1 in ious.shape:
    values = ious[:1, 0]
  else:
    values = ious[linear_sum_assignment(1 - ious)]
  good = values[values > HIT_IOU]
  if good.size == 0:
    return 0.0
  return float(good.mean() - COUNT_PENALTY * (sum(ious.shape) - 2 * good.size))


def _has_in_order(text: str, marks: Sequence[str]) -> bool:
  at = len("<think>")
  for mark in marks:
    found = text.find(mark, at)
    if found < 0:
      return False
    at = found + len(mark)
  return True


def _ious_with_eps(pred: np.ndarray, gt: np.ndarray) -> Float[np.ndarray, "M N"]:
  a = pred.reshape(len(pred), -1).astype(np.float32)
  b = gt.reshape(len(gt), -1).astype(np.float32)
  intersection = a @ b.T
  union = a.sum(1)[:, None] + b.sum(1)[None, :] - intersection
  return intersection / (union + np.float32(IOU_EPS))
