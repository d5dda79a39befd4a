"""VRT-Bench for a model behind an OpenAI-compatible API, on the scorer of eval.vrt_bench.

    python -m eval.api_baseline --base-url https://host/v1 --model NAME --box-format yxyx_1000 \\
      --data 'VRT-Eval/*.tfrecord' --out DIR --sam2 SAM2_DIR

The model is asked for a reasoning trace and an answer with a box behind every object; SAM 2 turns
boxes into masks. Writes `responses.jsonl` (one line a question as it comes; an interrupted run goes
on from it), `predictions.jsonl` for eval.score, `usage.json`, `ver_evaluation_results.json` and
`report.html`.
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from eval.api.client import ApiKey, ChatClient, check_base_url
from eval.api.prediction import predict
from eval.api.questions import Prices, ask_all, totals
from eval.api.request import RequestSettings, parse_extra
from eval.api.responses import Response, ResponseLog
from eval.box_masks import BoxSegmenter
from eval.boxes import BoxFormat, find_boxes
from eval.report import write_report
from vrt_jax import cli
from vrt_jax.data.records import EvalRecord
from vrt_jax.data.sources import eval_records
from vrt_jax.evaluate import headline, sample_result, short_hash
from vrt_jax.files import write_whole
from vrt_jax.metrics import score_samples, write_results
from vrt_jax.model_directory import SHIPPED

PREDICTIONS_FILE = "predictions.jsonl"
USAGE_FILE = "usage.json"
CUT_OFF = "length"
"""finish_reason of an answer that reached the token limit."""


@dataclass(frozen=True)
class Args:
  """Asks a model behind an OpenAI-compatible API the questions of VRT-Eval, and scores it."""

  base_url: str
  """Address of the API, to which /chat/completions is added."""
  model: str
  """Name of the model there."""
  box_format: BoxFormat
  """How the model writes boxes: Gemini yxyx_1000, Qwen3-VL xyxy_1000, Qwen2.5-VL xyxy_px."""
  data: str
  """Path or glob of the VRT-Eval TFRecord files, or the folder of a prepared set."""
  out: Path
  """Folder for answers, predictions, results and report."""
  key_env: str = "OPENAI_API_KEY"
  """Environment variable with the key; without a value none is sent."""
  masks: Literal["sam2", "boxes"] = "sam2"
  """SAM 2 prompted with the boxes, or the boxes filled."""
  sam2: str = "shapes"
  """Model directory, of SAM 2 alone or of a whole model. The shipped one never learned boxes."""
  max_boxes: int = 64
  """Boxes a text that get a mask, from the first."""
  max_side: int = 0
  """Longer side in pixels to which larger pictures are scaled down to be sent; 0 leaves them."""
  max_tokens: int = 8192
  """Limit of an answer."""
  temperature: float = 0.0
  extra: str = "{}"
  """JSON object of further request fields; null takes one out. No secrets: it is written down."""
  concurrency: int = 8
  """Questions asked at once."""
  timeout_s: float = 180.0
  """For one attempt."""
  retries: int = 6
  """Further attempts after a time-out, 429, 5xx or a malformed answer."""
  input_price: float | None = None
  """Price of a million input tokens; with --output-price the cost is counted."""
  output_price: float | None = None
  num_samples: int = 0
  """Records that are asked about, from the first; 0 for all."""
  allow_errors: bool = False
  """Score questions that ended with an error as empty answers, instead of failing."""

  def request(self) -> RequestSettings:
    """The part that decides what is asked."""
    return RequestSettings(
      base_url=check_base_url(self.base_url),
      model=self.model,
      box_format=self.box_format,
      max_side=self.max_side,
      max_tokens=self.max_tokens,
      temperature=self.temperature,
      extra=json.dumps(parse_extra(self.extra), sort_keys=True),
    )

  def prices(self) -> Prices | None:
    """None where none are given."""
    if self.input_price is None or self.output_price is None:
      return None
    return Prices(self.input_price, self.output_price)


def baseline(args: Args) -> dict[str, Any]:
  """Asks, makes masks, scores and writes; returns the content of the results file.

  Raises:
    ValueError: bad arguments or data, a refusing endpoint, or questions without an answer.
  """
  check_args(args)
  key, settings = ApiKey(args.key_env), args.request()
  written = json.dumps(settings.fingerprint())
  if key.redact(written) != written:
    raise ValueError(f"the key stands in the arguments; it belongs in {args.key_env} alone")
  segmenter = BoxSegmenter(args.sam2) if args.masks == "sam2" else None
  records = read_records(args)
  with ResponseLog(args.out, settings.fingerprint()) as log:
    try:
      asyncio.run(_ask(args, settings, key, records, log))
    finally:
      responses = [log.responses[r.key] for r in records if r.key in log.responses]
      usage = usage_report(args, len(records), responses)
      write_whole(args.out / USAGE_FILE, json.dumps(usage, indent=2) + "\n")
  check_errors(args, responses)
  predictions = [
    predict(record, response, args.box_format, segmenter, args.max_boxes)
    for record, response in zip(tqdm(records, desc="masks", unit="sample"), responses, strict=True)
  ]
  lines = [json.dumps(prediction.line()) + "\n" for prediction in predictions]
  write_whole(args.out / PREDICTIONS_FILE, "".join(lines))
  samples = [
    sample_result(record, prediction.text, prediction.objects, thinking=True)
    for record, prediction in zip(records, predictions, strict=True)
  ]
  results = score_samples(samples, settings_hash(args, settings), model_path=args.model)
  write_results(results, args.out)
  images = {record.key: record.image for record in records}
  write_report(results, args.out, images)
  return results


def check_args(args: Args) -> None:
  """Raises ValueError for the first argument out of its range."""
  for name in ("max_boxes", "max_tokens", "concurrency", "timeout_s"):
    if getattr(args, name) <= 0:
      raise ValueError(f"--{name.replace('_', '-')} must be above 0")
  for name in ("max_side", "retries", "num_samples"):
    if getattr(args, name) < 0:
      raise ValueError(f"--{name.replace('_', '-')} must not be negative")
  if (args.input_price is None) != (args.output_price is None):
    raise ValueError("--input-price and --output-price go together")


def read_records(args: Args) -> list[EvalRecord]:
  """The records that are asked about; raises ValueError where a key is there twice."""
  records = eval_records(args.data, args.num_samples)
  seen = set()
  for record in records:
    if record.key in seen:
      raise ValueError(f"{args.data}: key {record.key!r} is there twice")
    seen.add(record.key)
  return records


async def _ask(
  args: Args,
  settings: RequestSettings,
  key: ApiKey,
  records: Sequence[EvalRecord],
  log: ResponseLog,
) -> None:
  async with ChatClient(
    settings.base_url,
    key,
    timeout_s=args.timeout_s,
    retries=args.retries,
    concurrency=args.concurrency,
  ) as client:
    await ask_all(
      client, settings, records, log, concurrency=args.concurrency, prices=args.prices()
    )


def check_errors(args: Args, responses: Sequence[Response]) -> None:
  """Raises ValueError where questions have no answer, unless that is allowed."""
  failed = [response for response in responses if response.error]
  if failed and not args.allow_errors:
    raise ValueError(
      f"{len(failed)} of {len(responses)} questions have no answer, the first is {failed[0].key!r}:"
      f" {failed[0].error}; the same command asks them again, --allow-errors scores them as empty"
    )


def usage_report(args: Args, questions: int, responses: Sequence[Response]) -> dict[str, Any]:
  """The content of `usage.json`: what was asked and paid, and what the texts held."""
  sums, prices = totals(responses), args.prices()
  answers = [response for response in responses if not response.error]
  parsed = [find_boxes(r.text, args.box_format, r.sent_size) for r in answers]
  return {
    "api": {
      "base_url": args.base_url,
      "model": args.model,
      "served_models": sorted({r.model for r in answers if r.model}),
      "questions": questions,
      **asdict(sums),
      "input_price": args.input_price,
      "output_price": args.output_price,
      "cost": sums.cost(prices) if prices else None,
      "median_seconds": round(statistics.median(r.seconds for r in answers), 3)
      if answers
      else None,
      "cut_off": sum(r.finish_reason == CUT_OFF for r in answers),
      "failed": {r.key: r.error for r in responses if r.error},
    },
    "boxes": {
      "found": sum(len(p.boxes) for p in parsed),
      "without_mask": sum(max(0, len(p.boxes) - args.max_boxes) for p in parsed),
      "malformed": sum(p.malformed for p in parsed),
      "empty": sum(p.empty for p in parsed),
    },
  }


def settings_hash(args: Args, settings: RequestSettings) -> str:
  """Short hash of what was asked and of how boxes became masks."""
  return short_hash(
    [settings.fingerprint(), args.masks, args.masks == "sam2" and args.sam2, args.max_boxes]
  )


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m eval.api_baseline", __doc__)
  if args.masks == "sam2" and args.sam2 in SHIPPED:
    print(
      "the shipped SAM 2 never learned boxes, its masks mean little: give --sam2 or --masks boxes",
      file=sys.stderr,
    )
  results = baseline(args)
  print(f"{headline(results)}  ({results['total_samples']} samples)")
  print(f"written to {args.out}")


if __name__ == "__main__":
  cli.run(main)
