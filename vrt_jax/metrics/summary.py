"""Means over masks (LQ, SQ, mIoU), per class, with bootstrap intervals over pictures.

A sample is a mapping with `reasoning_ious` and `answer_ious` (one value a ground-truth mask),
`class_ids` and, where several samples may share a picture, `image_id`. LQ is the share of
ground-truth masks with IoU > 0.5, SQ the mean IoU of those, mIoU the mean of all; an empty set
gives 0. Source: `evaluate_all_samples` of vrt_eval_single.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

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
  """[low, high] of each metric: percentiles over sets of resampled pictures.

  Deterministic in `seed`. Masks and questions of one picture are not independent, so a picture is
  drawn with all that belongs to it. Without samples every interval is [0, 0].
  """
  if not samples:
    return {name: [0.0, 0.0] for name in METRICS}
  weights = resampling_weights(cluster_indices(samples), seed, resamples)
  draws = resampled_metrics(samples, weights)
  tail = 100 * (1 - level) / 2
  return {
    name: [float(v) for v in np.percentile(values, [tail, 100 - tail])]
    for name, values in draws.items()
  }


def cluster_indices(samples: Sequence[Sample]) -> Int64[np.ndarray, "S"]:
  """The number of each sample's picture; a sample without `image_id` is a picture of its own."""
  numbers: dict[tuple[str, str | int], int] = {}
  keys = [
    ("image", sample["image_id"]) if sample.get("image_id") else ("sample", i)
    for i, sample in enumerate(samples)
  ]
  return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def resampling_weights(
  clusters: Int64[np.ndarray, "S"], seed: int, resamples: int
) -> Float[np.ndarray, "R S"]:
  """How often each sample is in each bootstrap set: its cluster's count of draws.

  As many clusters are drawn, with replacement, as there are.
  """
  count = int(clusters.max()) + 1
  rng = np.random.default_rng(seed)
  drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
  return drawn[:, clusters].astype(np.float64)


def resampled_metrics(
  samples: Sequence[Sample], weights: Float[np.ndarray, "R S"]
) -> dict[str, Float[np.ndarray, "R"]]:
  """Each metric of each weighted set of samples."""
  draws: dict[str, np.ndarray] = {}
  for role in ROLES:
    masks, total, hits, hit_total = (weights @ _sums(samples, role)).T
    draws |= {
      f"{role}_miou": _ratio(total, masks),
      f"{role}_lq": _ratio(hits, masks),
      f"{role}_sq": _ratio(hit_total, hits),
    }
  return draws


def detection(samples: Sequence[Sample], num_predicted: Sequence[int], role: str) -> dict:
  """`precision`, `f1` and `masks_per_sample` of a role, which LQ, SQ and mIoU do not see.

  Precision is the share of predicted masks whose partner has IoU > 0.5, F1 its harmonic mean with
  LQ; 0 where there is nothing to divide by.
  """
  predicted, ious = sum(num_predicted), pooled_ious(samples, role)
  hits = sum(iou > HIT_IOU for iou in ious)
  return {
    "precision": hits / predicted if predicted else 0.0,
    "f1": 2 * hits / (predicted + len(ious)) if predicted + len(ious) else 0.0,
    "masks_per_sample": predicted / len(samples) if samples else 0.0,
  }


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
