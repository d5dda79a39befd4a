"""The rewards of GRPO: does the text have the form, do the answer's and the trace's masks fit.

Source of the first two: `format_rewards_v2`, `answer_rewards_v3`, `MaskMatcher` of sa2va_grpo.py;
the trace's reward is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from scipy.optimize import linear_sum_assignment
from scipy.special import expit

from vrt_jax.data.trace import SEG
from vrt_jax.ops.resize import resize_nearest_numpy

COUNT_PENALTY = 0.1
HIT_IOU = 0.5
IOU_EPS = 1e-6

_ANSWER_FORM = ("<answer>", "[SEG]", "</answer>")
_THINK_AND_ANSWER = ("[SEG]", "</think>", *_ANSWER_FORM)
_ANSWER_ONLY = ("</think>", *_ANSWER_FORM)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Sample:
  """A completion and the truth about its prompt: what every reward function gets.

  Masks have the low-resolution size; mask m belongs to the m-th [SEG] token of the text. A [SEG]
  that comes last, or after the first `max_masks`, has none, so indices may lie beyond the masks.
  """

  text: str
  """With its end token, without padding."""
  truncated: bool
  """True where there is no end token: the text reached the token limit."""
  mask_logits: Float[np.ndarray, "M Y X"]
  """A pixel belongs to the mask where its logit is above 0."""
  seg_slots: Sequence[int]
  """Index of each mask's [SEG] among the generated ids."""
  reasoning_indices: Sequence[int]
  """[SEG]s before the answer span, counted in the text."""
  answer_indices: Sequence[int]
  """[SEG]s inside it."""
  answer_masks: UInt8[np.ndarray, "N Y X"]
  """Ground truth of the answer objects, 0 or 1."""
  evidence_masks: UInt8[np.ndarray, "E Y X"]
  """Ground truth of the objects that the reference trace's reasoning mentions."""
  num_tokens: int
  """Generated ids, the end token included."""
  num_segs: int
  """[SEG] tokens among them."""


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
  ious = _ious(mask_logits, gt_masks, answer_indices)
  if not ious.size:
    return 0.0
  if matching == "reference" and 1 in ious.shape:
    values = ious[:1, 0]
  else:
    values = ious[linear_sum_assignment(1 - ious)]
  good = values[values > HIT_IOU]
  if good.size == 0:
    return 0.0
  return float(good.mean() - COUNT_PENALTY * (sum(ious.shape) - 2 * good.size))


def trace_reward(
  mask_logits: Float[np.ndarray, "M Y X"] | None,
  evidence_masks: Shaped[np.ndarray, "E H W"],
  reasoning_indices: Sequence[int],
  matching: Literal["hungarian", "reference"] = "hungarian",
) -> float:
  """`answer_reward` of the reasoning masks against the evidence objects; the same errors.

  An object that the reasoning marks twice counts as one mask too many.
  """
  return answer_reward(mask_logits, evidence_masks, reasoning_indices, matching)


def mention_rewards(
  mask_logits: Float[np.ndarray, "M Y X"] | None,
  evidence_masks: Shaped[np.ndarray, "E H W"],
  reasoning_indices: Sequence[int],
) -> Float[np.ndarray, "R"]:
  """Of each reasoning mask, the IoU with its partner where it is over 0.5, else -0.1; float32.

  Partners are those of `trace_reward`: the second mask of an object counts as one too many, like
  one of no evidence object. Indices without a mask are left out.
  """
  ious = _ious(mask_logits, evidence_masks, reasoning_indices)
  rows, columns = linear_sum_assignment(1 - ious)
  values = np.zeros(len(ious), np.float32)
  values[rows] = ious[rows, columns]
  return np.where(values > HIT_IOU, values, -COUNT_PENALTY).astype(np.float32)


def is_orderly(sample: Sample) -> bool:
  """Whether a text ends by itself, has each of the four tags at most once and spells no [SEG].

  A [SEG] spelled with other tokens has no mask and would shift the roles of those that follow.
  """
  once = all(sample.text.count(tag) <= 1 for tag in _TAGS)
  return not sample.truncated and once and sample.text.count(SEG) == sample.num_segs


def _has_in_order(text: str, marks: Sequence[str]) -> bool:
  at = len("<think>")
  for mark in marks:
    found = text.find(mark, at)
    if found < 0:
      return False
    at = found + len(mark)
  return True


def _ious(
  mask_logits: Float[np.ndarray, "M Y X"] | None,
  gt_masks: Shaped[np.ndarray, "N H W"],
  indices: Sequence[int],
) -> Float[np.ndarray, "K N"]:
  """IoU of the masks that `indices` name, as far as there are any, with each true one."""
  if mask_logits is None:
    return np.zeros((0, len(gt_masks)), np.float32)
  logits = np.asarray(mask_logits, np.float32)
  indices = [i for i in indices if 0 <= i < len(logits)]
  if not indices or len(gt_masks) == 0:
    return np.zeros((len(indices), len(gt_masks)), np.float32)
  pred = expit(logits[indices]) > 0.5
  return _ious_with_eps(pred, resize_nearest_numpy(np.asarray(gt_masks), logits.shape[-2:]))


def _ious_with_eps(pred: np.ndarray, gt: np.ndarray) -> Float[np.ndarray, "M N"]:
  a = pred.reshape(len(pred), -1).astype(np.float32)
  b = gt.reshape(len(gt), -1).astype(np.float32)
  intersection = a @ b.T
  union = a.sum(1)[:, None] + b.sum(1)[None, :] - intersection
  return intersection / (union + np.float32(IOU_EPS))
