"""VRT-Eval records -> generated texts and masks -> scores, results file and pictures."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vrt_jax.config import EvalConfig
from vrt_jax.data.records import EvalRecord
from vrt_jax.draw import draw_overlay
from vrt_jax.generate.predictor import Prediction, Predictor, Request
from vrt_jax.metrics.results import SampleResult, score_samples, write_results


def sample_result(record: EvalRecord, prediction: Prediction, thinking: bool) -> SampleResult:
  """A record and what was predicted for it, ready to score."""
  with Image.open(io.BytesIO(record.image)) as picture:
    image_size = (picture.height, picture.width)
  return SampleResult(
    key=record.key,
    question=record.question,
    text=prediction.text,
    image_size=image_size,
    reasoning_gt=[record.objects[i]["mask"] for i in record.reasoning_ids],
    answer_gt=[record.objects[i]["mask"] for i in record.answer_ids],
    objects=prediction.objects(),
    class_ids=record.class_ids,
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
  config_hash: str = "",
  description: str = "evaluate",
) -> dict:
  """Generates and scores; writes `ver_evaluation_results.json` and overlay pictures to `out_dir`.

  Returns the content of the results file. The first `config.num_pictures` samples are drawn.
  """
  out_dir.mkdir(parents=True, exist_ok=True)
  requests = [Request(r.image, r.question) for r in records]
  samples = []
  bar = tqdm(predictor.predict(requests), total=len(records), desc=description, unit="sample")
  for record, prediction in zip(records, bar, strict=True):
    samples.append(sample_result(record, prediction, thinking))
    if len(samples) <= config.num_pictures:
      picture = Image.open(io.BytesIO(record.image)).convert("RGB")
      overlay = draw_overlay(
        picture, record.question, prediction.text, prediction.mentions, prediction.masks
      )
      overlay.save(out_dir / f"{len(samples):03d}.png")
  results = score_samples(samples, config_hash)
  write_results(results, out_dir)
  return results


def headline(results: dict) -> str:
  """R-LQ, R-SQ and A-mIoU in percent, as the paper prints them."""
  m = results["metrics"]
  return (
    f"R-LQ {100 * m['reasoning_lq']:.1f}  R-SQ {100 * m['reasoning_sq']:.1f}  "
    f"A-mIoU {100 * m['answer_miou']:.1f}"
  )
