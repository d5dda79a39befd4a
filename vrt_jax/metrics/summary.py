"""Means over masks (LQ, SQ, mIoU), per class, with bootstrap intervals over samples.

A sample is a mapping with `reasoning_ious` and `answer_ious` (one value a ground-truth mask) and
`class_ids`. LQ is the share of ground-truth masks with IoU > 0.5, SQ the mean IoU of those, mIoU
the mean of all; an empty set gives 0. Source: `evaluate_all_samples` of vrt_eval_single.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

HIT_IOU = 0.5
ROLES = ("reasoning", "answer")
METRICS = tuple(f"{role}_{name}" for role in ROLES for name in ("miou", "lq", "sq"))
CI_RESAMPLES = 2000
CI_LEVEL = 0.95

Sample = Mapping[str, Any]


def role_metrics(ious: Sequence[float], role: str) -> dict[str, float]:
  """`{role}_miou`, `{role}_lq` and `{role}_sq` of a flat list of IoUs, as fractions."""
  values = np.asarray(ious, np.float64)
  hits = values[values > HIT_IOU]
  return {
    f"{role}_miou": float(values.mean()) if values.size else 0.0,
    f"{role}_lq": float(hits.size / values.size) if values.size else 0.0,
    f"{role}_sq": float(hits.mean()) if hits.size else 0.0,
  }


def pooled_ious(samples: Sequence[Sample], role: str) -> list[float]:
  """All IoUs of one role, in sample order."""
  return [iou for sample in samples for iou in sample[f"{role}_ious"]]


def samples_by_class(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
  """The samples of each class id; a sample stands in each of its classes."""
  classes: dict[str, list[Sample]] = {}
  for sample in samples:
    for class_id in sample["class_ids"]:
      classes.setdefault(class_id, []).append(sample)
  return classes


def summarize(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
  """`metrics` over all samples and `per_cls_metrics` of each class id, with counts."""
  metrics: dict[str, float] = {}
  for role in ROLES:
    metrics |= role_metrics(pooled_ious(samples, role), role)
  per_class: dict[str, dict[str, float]] = {}
  for class_id, members in samples_by_class(samples).items():
    entry: dict[str, float] = {"sample_count": len(members)}
    for role in ROLES:
      ious = pooled_ious(members, role)
      entry |= role_metrics(ious, role) | {f"{role}_mask_count": len(ious)}
    per_class[class_id] = entry
  return {"metrics": metrics, "per_cls_metrics": per_class}


def bootstrap_ci(
  samples: Sequence[Sample],
  seed: int = 0,
  resamples: int = CI_RESAMPLES,
  level: float = CI_LEVEL,
) -> dict[str, list[float]]:
  """[low, high] of each metric: percentiles over resampled *samples* (the unit that is drawn).

  Deterministic in `seed`. Masks of one picture are not independent, so pictures are resampled, not
  masks. Without samples every interval is [0, 0].
  """
  if not samples:
    return {name: [0.0, 0.0] for name in METRICS}
  rng = np.random.default_rng(seed)
  count = len(samples)
  weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
  tail = 100 * (1 - level) / 2
  intervals = {}
  for role in ROLES:
    masks, total, hits, hit_total = (weights @ _sums(samples, role)).T
    draws = {
      f"{role}_miou": _ratio(total, masks),
      f"{role}_lq": _ratio(hits, masks),
      f"{role}_sq": _ratio(hit_total, hits),
    }
    for name, values in draws.items():
      intervals[name] = [float(v) for v in np.percentile(values, [tail, 100 - tail])]
  return intervals


def mask_precision(samples: Sequence[Sample], num_predicted: Sequence[int], role: str) -> float:
  """Share of a role's predicted masks whose partner has IoU > 0.5; 0 without predictions."""
  predicted = sum(num_predicted)
  hits = sum(iou > HIT_IOU for iou in pooled_ious(samples, role))
  return hits / predicted if predicted else 0.0


def _sums(samples: Sequence[Sample], role: str) -> Float[np.ndarray, "S 4"]:
  """Masks, total IoU, hits and total IoU of hits of each sample."""
  rows = []
  for sample in samples:
    values = np.asarray(sample[f"{role}_ious"], np.float64)
    hits = values[values > HIT_IOU]
    rows.append((values.size, values.sum(), hits.size, hits.sum()))
  return np.asarray(rows, np.float64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
