"""VRT-Eval records -> generated texts and masks -> scores, results file and pictures."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vrt_jax.config import EvalConfig
from vrt_jax.data.records import EvalRecord
from vrt_jax.draw import draw_overlay
from vrt_jax.generate.predictor import Prediction, Predictor, Request
from vrt_jax.metrics.results import PredictedMask, SampleResult, score_samples, write_results
from vrt_jax.runtime import is_leader

HEADLINE = {"R-LQ": "reasoning_lq", "R-SQ": "reasoning_sq", "A-mIoU": "answer_miou"}
"""The three published numbers, by their names in the results file."""


def sample_result(
  record: EvalRecord, text: str, objects: Sequence[PredictedMask], thinking: bool
) -> SampleResult:
  """A record and what was predicted for it, ready to score.

  Raises:
    ValueError: names the sample whose image cannot be read or whose labels name no object.
  """
  for object_id in [*record.reasoning_ids, *record.answer_ids]:
    if object_id not in record.objects:
      raise ValueError(f"sample {record.key}: labelled object {object_id} is not in objects_info")
  try:
    with Image.open(io.BytesIO(record.image)) as picture:
      image_size = (picture.height, picture.width)
  except OSError as error:
    raise ValueError(f"sample {record.key}: the image cannot be read ({error})") from error
  return SampleResult(
    key=record.key,
    question=record.question,
    text=text,
    image_size=image_size,
    reasoning_gt=[record.objects[i]["mask"] for i in record.reasoning_ids],
    answer_gt=[record.objects[i]["mask"] for i in record.answer_ids],
    objects=objects,
    class_ids=record.class_ids,
    image_id=hashlib.sha256(record.image).hexdigest()[:16],
    reasoning_obj_ids=[int(i) for i in record.reasoning_ids],
    answer_obj_ids=[int(i) for i in record.answer_ids],
    human_confidence=record.confidence,
    thinking=thinking,
  )


def evaluate(
  predictor: Predictor,
  records: Sequence[EvalRecord],
  out_dir: Path,
  config: EvalConfig,
  *,
  thinking: bool = True,
  order: Sequence[int] | None = None,
  config_hash: str = "",
  model_path: str = "",
  description: str = "evaluate",
) -> dict[str, Any]:
  """Generates and scores; writes `ver_evaluation_results.json` and overlay pictures to `out_dir`.

  Records are generated in `order` (indices, so that a batch holds prompts of like size) and
  reported in their own. Returns the content of the results file. The first `config.num_pictures`
  records are drawn. Of several processes, which all call this, one writes.
  """
  writes = is_leader()
  if writes:
    out_dir.mkdir(parents=True, exist_ok=True)
  order = range(len(records)) if order is None else order
  samples: dict[int, SampleResult] = {}
  for i, prediction in _predictions(predictor, records, order, description):
    record = records[i]
    samples[i] = sample_result(record, prediction.text, prediction.objects(), thinking)
    if writes and i < config.num_pictures:
      picture = Image.open(io.BytesIO(record.image)).convert("RGB")
      overlay = draw_overlay(
        picture, record.question, prediction.text, prediction.mentions, prediction.masks
      )
      overlay.save(out_dir / f"{i + 1:03d}.png")
  in_order = [samples[i] for i in range(len(records))]
  results = score_samples(in_order, config_hash, model_path=model_path)
  if writes:
    write_results(results, out_dir)
  return results


def _predictions(
  predictor: Predictor, records: Sequence[EvalRecord], order: Sequence[int], description: str
) -> Iterator[tuple[int, Prediction]]:
  """(index of the record, its prediction), with a progress bar."""
  requests = [Request(records[i].image, records[i].question) for i in order]
  bar = tqdm(
    predictor.predict(requests),
    total=len(order),
    desc=description,
    unit="sample",
    disable=not is_leader(),
  )
  yield from zip(order, bar, strict=True)


def short_hash(settings: object) -> str:
  """Twelve hex digits that tell settings (JSON values) apart: `config_hash` of a results file."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def headline(results: Mapping[str, Any]) -> str:
  """R-LQ, R-SQ and A-mIoU in percent, each with its 95 % interval."""
  parts = []
  for label, name in HEADLINE.items():
    low, high = (100 * v for v in results["metrics_ci"][name])
    parts.append(f"{label} {100 * results['metrics'][name]:.1f} [{low:.1f}, {high:.1f}]")
  return "  ".join(parts)
