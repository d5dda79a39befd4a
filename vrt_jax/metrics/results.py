"""`ver_evaluation_results.json`: the reference's schema plus intervals, precision and validity."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vrt_jax.code_version import code_version
from vrt_jax.data.trace import answer_spans
from vrt_jax.files import write_whole
from vrt_jax.metrics.breakdowns import breakdowns
from vrt_jax.metrics.matching import partner_ious
from vrt_jax.metrics.summary import (
  ROLES,
  bootstrap_ci,
  detection,
  pooled_ious,
  samples_by_class,
  summarize,
)
from vrt_jax.ops.masks import Mask, Rle, area_shares, as_rle, check_mask_size, rle_iou_matrix

RESULTS_FILE = "ver_evaluation_results.json"

INVALID_REASONS = ("no_answer_span", "several_answer_spans", "no_answer_mask")

Role = Literal["reasoning", "answer", "none"]


@dataclasses.dataclass(frozen=True)
class PredictedMask:
  """One predicted mask at image size, in the order of the text's [SEG] tokens."""

  rle: Mask
  role: Role
  index: int = 0
  """Which [SEG] of the text this is."""
  phrase: str = ""
  text_span: tuple[int, int] = (0, 0)
  """[start, end) characters of the phrase and its markup in the text."""
  object_number: int | None = None
  """N of `<objN>`, where the text gives one."""
  score: float | None = None
  """Predicted IoU, where known."""


@dataclasses.dataclass(frozen=True)
class SampleResult:
  """One question with its ground truth and what the model answered."""

  key: str
  question: str
  text: str
  image_size: tuple[int, int]
  """(height, width) of the picture; every mask has this size."""
  reasoning_gt: Sequence[Mask]
  answer_gt: Sequence[Mask]
  objects: Sequence[PredictedMask]
  class_ids: Sequence[str] = ()
  image_id: str = ""
  """Equal for questions about one picture; "" where that is not known."""
  reasoning_obj_ids: Sequence[int] = ()
  answer_obj_ids: Sequence[int] = ()
  human_confidence: int = 0
  thinking: bool = True
  """False where the prompt asked for no trace: then every mask is an answer mask."""

  def masks(self, role: Role) -> list[Mask]:
    """The predicted masks of one role."""
    return [o.rle for o in self.objects if o.role == role]

  def invalid_reason(self) -> str:
    """Why the output is no answer, one of `INVALID_REASONS`, or ""."""
    spans = len(answer_spans(self.text))
    if self.thinking and spans != 1:
      return "several_answer_spans" if spans else "no_answer_span"
    return "" if self.masks("answer") else "no_answer_mask"


def score_samples(
  samples: Sequence[SampleResult],
  config_hash: str = "",
  *,
  model_path: str = "",
  seed: int = 0,
) -> dict[str, Any]:
  """The content of the results file; `seed` is the bootstrap's.

  Raises ValueError naming the sample where a mask is malformed or not of the picture's size.
  """
  details = [score_sample(sample) for sample in samples]
  return results_of(details, config_hash, model_path=model_path, seed=seed)


def results_of(
  details: Sequence[Mapping[str, Any]],
  config_hash: str = "",
  *,
  model_path: str = "",
  seed: int = 0,
) -> dict[str, Any]:
  """The content of the results file from the entries of its `detailed_results`."""
  ious = [sample_ious(detail) for detail in details]
  reasons = [detail["error"] for detail in details]
  found = {
    role: detection(ious, [d["prediction"][f"num_{role}_masks"] for d in details], role)
    for role in ROLES
  }
  pooled = {role: pooled_ious(ious, role) for role in ROLES}
  return {
    "model_path": model_path,
    "use_thinking": all(detail["prediction"]["thinking"] for detail in details),
    "config_hash": config_hash,
    "code_version": code_version(),
    "seed": seed,
    "total_samples": len(details),
    "total_reasoning_masks_evaluated": len(pooled["reasoning"]),
    "total_answer_masks_evaluated": len(pooled["answer"]),
    **summarize(ious),
    "metrics_ci": bootstrap_ci(ious, seed),
    **{name: {role: found[role][name] for role in ROLES} for name in found["answer"]},
    "breakdowns": breakdowns(details),
    "invalid": sum(map(bool, reasons)) / len(reasons) if reasons else 0.0,
    "invalid_reasons": {reason: reasons.count(reason) for reason in INVALID_REASONS},
    "detailed_results": details,
    "raw_reasoning_ious": pooled["reasoning"],
    "raw_answer_ious": pooled["answer"],
    **_per_class_lists(ious),
  }


def sample_ious(detail: Mapping[str, Any]) -> dict[str, Any]:
  """What `vrt_jax.metrics.summary` needs of an entry of `detailed_results`, ours or another's."""
  info = detail["sample_info"]
  return {
    **detail["evaluation_details"],
    "class_ids": info["class_ids"],
    "image_id": info.get("image_id", ""),
  }


def score_sample(sample: SampleResult) -> dict[str, Any]:
  """One entry of `detailed_results`; raises ValueError naming the sample for a bad mask."""
  try:
    gt = {"reasoning": _normal(sample.reasoning_gt), "answer": _normal(sample.answer_gt)}
    objects = [_object_entry(o) for o in sample.objects]
    for mask in [*gt["reasoning"], *gt["answer"], *(o["rle"] for o in objects)]:
      check_mask_size(mask, sample.image_size)
  except ValueError as error:
    raise ValueError(f"sample {sample.key}: {error}") from error
  rles = {role: [o["rle"] for o in objects if o["role"] == role] for role in ROLES}
  ious = {role: partner_ious(rle_iou_matrix(rles[role], gt[role])) for role in ROLES}
  return {
    "sample_info": {
      "key": sample.key,
      "question": sample.question,
      "human_confidence": sample.human_confidence,
      "class_ids": list(sample.class_ids),
      "image_id": sample.image_id,
    },
    "image_size": list(sample.image_size),
    "ground_truth": {
      "reasoning_obj_ids": list(sample.reasoning_obj_ids),
      "answer_obj_ids": list(sample.answer_obj_ids),
      "num_reasoning_masks": len(sample.reasoning_gt),
      "num_answer_masks": len(sample.answer_gt),
      **{f"{role}_area_shares": area_shares(gt[role]) for role in ROLES},
      **{f"{role}_masks_rle": gt[role] for role in ROLES},
    },
    "prediction": {
      "text": sample.text.encode("utf-8", "replace").decode(),  # half characters cannot be saved
      "thinking": sample.thinking,
      "num_pred_masks": len(objects),
      "num_reasoning_masks": len(rles["reasoning"]),
      "num_answer_masks": len(rles["answer"]),
      "reasoning_masks_rle": rles["reasoning"],
      "answer_masks_rle": rles["answer"],
      "objects": objects,
    },
    "evaluation": {f"{r}_miou": float(np.mean(ious[r])) if ious[r] else 0.0 for r in ROLES},
    "evaluation_details": {f"{r}_ious": ious[r] for r in ROLES},
    "error": sample.invalid_reason(),
  }


def write_results(results: dict[str, Any], out_dir: str | os.PathLike[str]) -> Path:
  """Writes `ver_evaluation_results.json` into `out_dir`, whole or not at all; returns its path."""
  out_dir = Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  path = out_dir / RESULTS_FILE
  write_whole(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False))
  return path


def _normal(masks: Sequence[Mask]) -> list[Rle]:
  return [as_rle(mask) for mask in masks]


def _object_entry(item: PredictedMask) -> dict[str, Any]:
  if item.role not in (*ROLES, "none"):
    raise ValueError(f"role: {item.role!r} is not one of reasoning, answer, none")
  entry = dataclasses.asdict(dataclasses.replace(item, rle=as_rle(item.rle)))
  return entry | {"text_span": list(item.text_span)}


def _per_class_lists(ious: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Raw per-class lists and counts, with which the reference merges the files of its ranks."""
  classes = samples_by_class(ious)
  lists: dict[str, dict[str, Any]] = {
    "per_cls_sample_count": {c: len(members) for c, members in classes.items()}
  }
  for role in ROLES:
    per_class = {c: pooled_ious(members, role) for c, members in classes.items()}
    lists[f"per_cls_{role}_ious"] = per_class
    lists[f"per_cls_{role}_mask_count"] = {c: len(v) for c, v in per_class.items()}
  return lists
