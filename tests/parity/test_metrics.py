"""The metric suite against the reference's rules in plain loops, on random data sets.

Source of the rules: `calculate_miou` and `evaluate_all_samples` of vrt_eval_single.py.
"""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vrt_jax.metrics import PredictedMask, SampleResult, score_samples
from vrt_jax.ops.masks import encode_rle

SETS, SAMPLES = 40, 10
SIZE = (9, 14)
CLASSES = ("#loc", "#comp", "#func")
TEXT = "<think>[SEG]</think><answer>[SEG]</answer>"


def random_mask(rng: np.random.Generator) -> np.ndarray:
  """A rectangle on a coarse grid, so that equal IoUs and equal masks are frequent; 1 in 8 empty."""
  mask = np.zeros(SIZE, bool)
  if rng.random() < 1 / 8:
    return mask
  y, x = rng.integers(0, 3, 2) * 3
  mask[y : y + rng.integers(1, 3) * 3, x : x + rng.integers(1, 4) * 3] = True
  return mask


def random_masks(rng: np.random.Generator, near: list[np.ndarray]) -> list[np.ndarray]:
  """None to five masks; half of them are one of `near`, some with a row more or less."""
  masks = []
  for _ in range(rng.integers(0, 6)):
    mask = random_mask(rng)
    if near and rng.random() < 0.5:
      mask = near[rng.integers(len(near))].copy()
      if rng.random() < 0.5:
        mask[rng.integers(SIZE[0])] = rng.random() < 0.5
    masks.append(mask)
  return masks


def random_set(seed: int) -> list[dict]:
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(SAMPLES):
    entry = {"class_ids": [c for c in CLASSES if rng.random() < 0.4]}
    for role in ("reasoning", "answer"):
      entry[f"{role}_gt"] = random_masks(rng, [])
      entry[f"{role}_pred"] = random_masks(rng, entry[f"{role}_gt"])
    found.append(entry)
  return found


def plain_ious(pred: list[np.ndarray], gt: list[np.ndarray]) -> list[float]:
  """One IoU a true mask: partners of the least total cost, where a cost is 1 - IoU."""
  values = [0.0] * len(gt)
  if not pred or not gt:
    return values
  table = np.zeros((len(pred), len(gt)), np.float32)
  for i, one in enumerate(pred):
    for j, other in enumerate(gt):
      shared, either = int((one & other).sum()), int((one | other).sum())
      table[i, j] = shared / either if either else 0.0
  for i, j in zip(*linear_sum_assignment(1 - table), strict=True):
    values[j] = float(table[i, j])
  return values


def plain_metrics(samples: list[dict], hit=lambda iou: iou > 0.5) -> dict[str, float]:
  numbers = {}
  for role in ("reasoning", "answer"):
    ious = [v for s in samples for v in plain_ious(s[f"{role}_pred"], s[f"{role}_gt"])]
    good = [v for v in ious if hit(v)]
    numbers[f"{role}_miou"] = sum(ious) / len(ious) if ious else 0.0
    numbers[f"{role}_lq"] = len(good) / len(ious) if ious else 0.0
    numbers[f"{role}_sq"] = sum(good) / len(good) if good else 0.0
  return numbers


def our_results(samples: list[dict], seed: int) -> dict:
  """Through the results file's road, each mask dense or as an RLE."""
  rng = np.random.default_rng(seed)

  def given(mask: np.ndarray):
    return encode_rle(mask) if rng.random() < 0.5 else mask

  return score_samples(
    [
      SampleResult(
        key=str(i),
        question="?",
        text=TEXT,
        image_size=SIZE,
        reasoning_gt=[given(m) for m in s["reasoning_gt"]],
        answer_gt=[given(m) for m in s["answer_gt"]],
        objects=[
          PredictedMask(given(m), role)
          for role in ("reasoning", "answer")
          for m in s[f"{role}_pred"]
        ],
        class_ids=s["class_ids"],
      )
      for i, s in enumerate(samples)
    ]
  )


@pytest.mark.parametrize("seed", range(SETS))
def test_random_data_sets_have_the_references_numbers(seed):
  samples = random_set(seed)
  results = our_results(samples, seed)
  assert results["metrics"] == pytest.approx(plain_metrics(samples), rel=0, abs=1e-12)
  for class_id, entry in results["per_cls_metrics"].items():
    members = [s for s in samples if class_id in s["class_ids"]]
    expected = plain_metrics(members) | {"sample_count": len(members)}
    assert {k: entry[k] for k in expected} == pytest.approx(expected, rel=0, abs=1e-12)


def test_the_data_sets_tell_other_rules_apart():
  """Controls: a hit at exactly 0.5, and greedy partners, give other numbers on them."""
  at_half = greedy = 0
  for seed in range(SETS):
    samples = random_set(seed)
    at_half += plain_metrics(samples) != plain_metrics(samples, hit=lambda iou: iou >= 0.5)
    for sample in samples:
      pred, gt = sample["answer_pred"], sample["answer_gt"]
      best = [max((plain_ious([p], [g])[0] for p in pred), default=0.0) for g in gt]
      greedy += not np.allclose(best, plain_ious(pred, gt), atol=1e-12)
  assert at_half > SETS / 4 and greedy > SETS / 4
