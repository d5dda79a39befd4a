"""Scores saved predictions against VRT-Eval data.

    python -m eval.score --predictions predictions.jsonl --data 'VRT-Eval/*.tfrecord' --out DIR

Predictions are a `ver_evaluation_results.json` (this project's or the reference's) or JSON lines,
one object a question: {"key", "text", "objects": [{"role", "rle"}, ..]}, optionally "thinking".
Writes `ver_evaluation_results.json` and `report.html`. With `--against` other predictions for the
same questions, also says whether the difference is more than chance (a paired bootstrap).
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.report import write_report
from vrt_jax import cli
from vrt_jax.data.records import EvalRecord
from vrt_jax.data.sources import eval_source
from vrt_jax.data.trace import mentions
from vrt_jax.evaluate import HEADLINE, headline, sample_result
from vrt_jax.metrics import PredictedMask, SampleResult, score_samples, write_results
from vrt_jax.metrics.comparison import paired_difference
from vrt_jax.metrics.results import sample_ious


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """Scores saved predictions against VRT-Eval data."""

  predictions: Path
  """A ver_evaluation_results.json or JSON lines."""
  data: str
  """Path or glob of the VRT-Eval TFRecord files, or the folder of a prepared set."""
  out: Path
  """Folder for ver_evaluation_results.json and report.html."""
  against: Path | None = None
  """Another model's predictions, to compare with."""
  subset: bool = False
  """Score only the questions that have a prediction, instead of failing."""


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model said about one question."""

  text: str
  objects: Sequence[PredictedMask]
  thinking: bool = True


def load_predictions(path: Path) -> tuple[dict[str, Prediction], dict[str, Any]]:
  """Predictions by key, and `config_hash` and `model_path` where the file has them.

  Raises ValueError that names the line or entry for anything malformed or given twice.
  """
  text = path.read_text(encoding="utf-8")
  found: dict[str, Prediction] = {}
  header, entries = _entries(text, path)
  for where, entry in entries:
    try:
      key, prediction = _parse_entry(entry)
    except (KeyError, TypeError) as error:
      raise ValueError(f"{path}, {where}: a prediction needs {_missing(error)}") from error
    if key in found:
      raise ValueError(f"{path}, {where}: key {key!r} is given twice")
    found[key] = prediction
  if not found:
    raise ValueError(f"{path} holds no predictions")
  return found, header


def score(config: ScoreConfig) -> dict[str, Any]:
  """Reads, scores and writes; returns the results. Raises ValueError or OSError on bad input.

  With `config.against` the results have a "comparison": {"against", "differences": {metric:
  {"mean", "low", "high", "p_value"}}}, ours minus theirs.
  """
  predictions, header = load_predictions(config.predictions)
  others = load_predictions(config.against)[0] if config.against else None
  records = list(tqdm(eval_source(config.data), desc="reading", unit=" samples"))
  samples = paired_samples(predictions, records, config)
  results = score_samples(samples, **header)
  if others is not None:
    theirs = score_samples(paired_samples(others, records, config))
    results["comparison"] = {
      "against": str(config.against),
      "differences": compare(results, theirs),
    }
  write_results(results, config.out)
  images = {record.key: record.image for record in records}
  write_report(results, config.out, images)
  return results


def paired_samples(
  predictions: Mapping[str, Prediction], records: Sequence[EvalRecord], config: ScoreConfig
) -> list[SampleResult]:
  """Every record with what was predicted for it.

  Raises:
    ValueError: a key is there twice, a prediction has no record, or a record has no prediction
      (with `config.subset` it is left out).
  """
  counts = Counter(record.key for record in records)
  twice = next((key for key, count in counts.items() if count > 1), None)
  if twice is not None:
    raise ValueError(f"{config.data}: key {twice!r} is there twice")
  unknown = [key for key in predictions if key not in counts]
  if unknown:
    raise ValueError(f"{len(unknown)} predictions are not in the data, the first is {unknown[0]!r}")
  missing = [key for key in counts if key not in predictions]
  if missing and not config.subset:
    raise ValueError(
      f"{len(missing)} of {len(records)} samples have no prediction, the first is {missing[0]!r}"
      " (--subset scores the others)"
    )
  found = [(record, predictions[record.key]) for record in records if record.key in predictions]
  return [sample_result(record, p.text, p.objects, p.thinking) for record, p in found]


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """`paired_difference` of two results; ValueError where they are not about the same questions."""
  details = [results["detailed_results"] for results in (ours, theirs)]
  if len({tuple(d["sample_info"]["key"] for d in entries) for entries in details}) > 1:
    raise ValueError("--subset --against: the two have predictions for different questions")
  runs = [[sample_ious(d) for d in entries] for entries in details]
  differences = paired_difference(runs[:1], runs[1:])
  return {name: dataclasses.asdict(difference) for name, difference in differences.items()}


def main() -> None:
  """Command line."""
  config = cli.parse(ScoreConfig, sys.argv[1:], "python -m eval.score", __doc__)
  results = score(config)
  print(f"{headline(results)}  ({results['total_samples']} samples)")
  if config.against:
    print(comparison_lines(results["comparison"]))
  print(f"written to {config.out}")


def comparison_lines(comparison: Mapping[str, Any]) -> str:
  """The published metrics' differences in points, each with its interval and p value."""
  lines = [f"against {comparison['against']}, in points:"]
  for label, name in HEADLINE.items():
    d = comparison["differences"][name]
    low, mean, high = (f"{100 * d[field]:+.1f}" for field in ("low", "mean", "high"))
    lines.append(f"  {label:7} {mean} [{low}, {high}]  p = {d['p_value']:.3f}")
  return "\n".join(lines)


def _missing(error: KeyError | TypeError) -> str:
  return f"the field {error}" if isinstance(error, KeyError) else f"other types ({error})"


def _entries(text: str, path: Path) -> tuple[dict[str, str], Iterator[tuple[str, Any]]]:
  """(header, (place, entry) ..) of either file format."""
  try:
    whole = json.loads(text)
  except json.JSONDecodeError:
    whole = None
  if not isinstance(whole, dict) or not isinstance(whole.get("detailed_results"), list):
    return {}, _lines(text, path)
  header = {k: whole[k] for k in ("config_hash", "model_path") if isinstance(whole.get(k), str)}
  thinking = whole.get("use_thinking", True)
  entries = ((f"entry {i}", (entry, thinking)) for i, entry in enumerate(whole["detailed_results"]))
  return header, entries


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(text.splitlines(), start=1):
    if not line.strip():
      continue
    try:
      yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error


def _parse_entry(entry: Any) -> tuple[str, Prediction]:
  if isinstance(entry, tuple):
    detail, thinking = entry
    prediction = detail["prediction"]
    thinking = prediction.get("thinking", thinking)
    key, text = detail["sample_info"]["key"], prediction["text"]
    objects = prediction["objects"] if "objects" in prediction else _by_role(prediction)
  else:
    key, text, objects = entry["key"], entry["text"], entry["objects"]
    thinking = entry.get("thinking", True)
  if not isinstance(key, str) or not isinstance(text, str):
    raise TypeError("key and text must be strings")
  return key, Prediction(text, _predicted_masks(text, objects), bool(thinking))


def _by_role(prediction: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The objects of a results file of the reference, which lists masks by role without index."""
  found = mentions(prediction["text"])
  objects = []
  for role in ("reasoning", "answer"):
    rles = prediction[f"{role}_masks_rle"]
    indices = [m.index for m in found if m.role == role]
    if len(indices) < len(rles):  # without thinking every mask is an answer mask
      indices = [m.index for m in found] + [-1] * len(rles)
    pairs = zip(indices, rles, strict=False)
    objects += [{"index": index, "role": role, "rle": rle} for index, rle in pairs]
  return objects


def _predicted_masks(text: str, objects: Sequence[Mapping[str, Any]]) -> list[PredictedMask]:
  """Objects of a file as masks; phrase and number come from the text, else from the file."""
  by_index = {m.index: m for m in mentions(text)}
  masks = []
  for position, item in enumerate(objects):
    if not isinstance(item, Mapping):
      raise TypeError("objects must be a list of objects")
    index = item.get("index", position)
    mention = by_index.get(index)
    masks.append(
      PredictedMask(
        rle=item["rle"],
        role=item["role"],
        index=index,
        phrase=mention.phrase if mention else str(item.get("phrase", "")),
        text_span=mention.text_span if mention else tuple(item.get("text_span", (0, 0))),
        object_number=mention.object_number if mention else item.get("object_number"),
        score=item.get("score"),
      )
    )
  return masks


if __name__ == "__main__":
  cli.run(main)
