"""LQ, SQ and mIoU of parts of the data: by target size, number of evidence objects, text length."""

from collections.abc import Mapping, Sequence
from typing import Any

from vrt_jax.metrics.summary import ROLES, pooled_ious, role_metrics

SIZE_BINS = (("below 1 %", 0.01), ("1 to 10 %", 0.1), ("above 10 %", float("inf")))
"""Of a true mask: its share of the picture."""
EVIDENCE_BINS = (("0", 1), ("1", 2), ("2", 3), ("3", 4), ("4 or more", float("inf")))
"""Of a question: the objects that its true reasoning relies on."""
LENGTH_BINS = (
  ("below 50", 50),
  ("50 to 99", 100),
  ("100 to 199", 200),
  ("200 or more", float("inf")),
)
"""Of an output: its words."""

Bins = Sequence[tuple[str, float]]


def bin_of(value: float, bins: Bins) -> str:
  """Name of the first bin whose upper end is above `value`."""
  return next(name for name, end in bins if value < end)


def breakdowns(details: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
  """Of entries of `detailed_results`: {"target_size" | "num_evidence" | "num_words": {bin: ..}}.

  A bin has the metrics of both roles and their numbers of masks; by size every true mask counts in
  its own bin, otherwise all of a sample's in the sample's, with `sample_count`. Empty bins are left
  out.
  """
  return {
    "target_size": _by_size(details),
    "num_evidence": _by_sample(
      details, [d["ground_truth"]["num_reasoning_masks"] for d in details], EVIDENCE_BINS
    ),
    "num_words": _by_sample(
      details, [len(d["prediction"]["text"].split()) for d in details], LENGTH_BINS
    ),
  }


def _by_size(details: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  binned: dict[str, dict[str, list[float]]] = {
    name: {role: [] for role in ROLES} for name, _ in SIZE_BINS
  }
  for detail in details:
    for role in ROLES:
      shares = detail["ground_truth"][f"{role}_area_shares"]
      ious = detail["evaluation_details"][f"{role}_ious"]
      for share, iou in zip(shares, ious, strict=True):
        binned[bin_of(share, SIZE_BINS)][role].append(iou)
  return {name: _entry(ious) for name, ious in binned.items() if any(ious.values())}


def _by_sample(
  details: Sequence[Mapping[str, Any]], values: Sequence[float], bins: Bins
) -> dict[str, dict[str, float]]:
  found = {}
  for name, _ in bins:
    members = [
      detail["evaluation_details"]
      for detail, value in zip(details, values, strict=True)
      if bin_of(value, bins) == name
    ]
    if members:
      ious = {role: pooled_ious(members, role) for role in ROLES}
      found[name] = {"sample_count": len(members)} | _entry(ious)
  return found


def _entry(ious: Mapping[str, Sequence[float]]) -> dict[str, float]:
  entry: dict[str, float] = {}
  for role in ROLES:
    entry |= role_metrics(ious[role], role) | {f"{role}_mask_count": len(ious[role])}
  return entry
