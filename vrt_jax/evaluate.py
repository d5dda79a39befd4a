"""VRT-Eval records -> generated texts and masks -> scores, results file and pictures."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vrt_jax.config import EvalConfig
from vrt_jax.data.records import EvalRecord
from vrt_jax.draw import draw_overlay
from vrt_jax.generate.predictor import Predictor, Request
from vrt_jax.metrics.results import (
  PredictedMask,
  SampleResult,
  results_of,
  sample_ious,
  score_sample,
  write_results,
)
from vrt_jax.metrics.summary import summarize
from vrt_jax.partial import Partial
from vrt_jax.runtime import CompileCounter, is_leader

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
  partial: Partial | None = None,
) -> dict[str, Any]:
  """Generates and scores; writes `ver_evaluation_results.json` and overlay pictures to `out_dir`.

  Records are generated in `order` (indices, so that a batch holds prompts of like size) and
  reported in their own. Returns the content of the results file. The first `config.num_pictures`
  records are drawn; the bar shows the scores so far and how many programs were compiled, which
  stops after the first batch of each size. Of several processes, which all call this, one writes.
  With `partial` the batches that it has are not generated again, and new ones are added to it.
  """
  writes = is_leader()
  if writes:
    out_dir.mkdir(parents=True, exist_ok=True)
  order = range(len(records)) if order is None else order
  details: dict[int, dict[str, Any]] = {}
  with (
    closing(CompileCounter()) as programs,
    tqdm(total=len(order), desc=description, unit="sample", disable=not writes) as bar,
  ):
    for numbers, answers in _batches(predictor, records, order, config.batch_size, partial):
      for i, (text, objects) in zip(numbers, answers, strict=True):
        details[i] = score_sample(sample_result(records[i], text, objects, thinking))
        if writes and i < config.num_pictures:
          _draw(records[i], text, objects).save(out_dir / f"{i + 1:03d}.png")
      bar.update(len(numbers))
      figures = running_metrics(details.values())
      bar.set_postfix_str(f"{figures}  programs compiled {programs.count}")
  in_order = [details[i] for i in range(len(records))]
  results = results_of(in_order, config_hash, model_path=model_path)
  if writes:
    write_results(results, out_dir)
  return results


Answer = tuple[str, Sequence[PredictedMask]]
"""A text and its masks."""


def _batches(
  predictor: Predictor,
  records: Sequence[EvalRecord],
  order: Sequence[int],
  batch_size: int,
  partial: Partial | None,
) -> Iterator[tuple[Sequence[int], list[Answer]]]:
  """(indices of the records, their answers) batch by batch, from `partial` as far as it goes."""
  for position, start in enumerate(range(0, len(order), batch_size)):
    numbers = order[start : start + batch_size]
    if partial is not None and position < len(partial.entries):
      entries = partial.entries[position]
      yield numbers, [(e["text"], [PredictedMask(**o) for o in e["objects"]]) for e in entries]
      continue
    requests = [Request(records[i].image, records[i].question) for i in numbers]
    answers: list[Answer] = [(found.text, found.objects()) for found in predictor.predict(requests)]
    if partial is not None:
      partial.add([{"text": t, "objects": [asdict(o) for o in objects]} for t, objects in answers])
    yield numbers, answers


def _draw(record: EvalRecord, text: str, objects: Sequence[PredictedMask]) -> Image.Image:
  with Image.open(io.BytesIO(record.image)) as picture:
    return draw_overlay(picture, record.question, text, objects, [o.rle for o in objects])


def running_metrics(details: Iterable[Mapping[str, Any]]) -> str:
  """The three published numbers of the samples so far, for a progress bar."""
  metrics = summarize([sample_ious(detail) for detail in details])["metrics"]
  return "  ".join(f"{label} {100 * metrics[name]:.1f}" for label, name in HEADLINE.items())


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
