"""Scores saved predictions against VRT-Eval data.

    python -m eval.score --predictions predictions.jsonl --data 'VRT-Eval/*.tfrecord' --out DIR

Predictions are a `ver_evaluation_results.json` (this project's or the reference's) or JSON lines,
one object a question: {"key", "text", "objects": [{"role", "rle"}, ..]}, optionally "thinking".
Writes `ver_evaluation_results.json` and `report.html`.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.report import write_report
from vrt_jax import cli
from vrt_jax.data.sources import eval_source
from vrt_jax.data.trace import mentions
from vrt_jax.evaluate import headline, sample_result
from vrt_jax.metrics import PredictedMask, score_samples, write_results


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """Scores saved predictions against VRT-Eval data."""

  predictions: Path
  """A ver_evaluation_results.json or JSON lines."""
  data: str
  """Path or glob of the VRT-Eval TFRecord files, or the folder of a prepared set."""
  out: Path
  """Folder for ver_evaluation_results.json and report.html."""
  subset: bool = False
  """Score only the questions that have a prediction, instead of failing."""
  pictures: int = 100
  """How many of the worst samples get a picture in the report."""


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model said about one question."""

  text: str
  objects: Sequence[PredictedMask]
  thinking: bool = True


def load_predictions(path: Path) -> tuple[dict[str, Prediction], dict[str, str]]:
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
  """Reads, scores and writes; returns the results. Raises ValueError or OSError on bad input."""
  predictions, header = load_predictions(config.predictions)
  samples, images = [], {}
  missing = []
  for record in tqdm(eval_source(config.data), desc="reading", unit=" samples"):
    if record.key not in predictions:
      missing.append(record.key)
      continue
    if record.key in images:
      raise ValueError(f"{config.data}: key {record.key!r} is there twice")
    found = predictions[record.key]
    samples.append(sample_result(record, found.text, found.objects, found.thinking))
    images[record.key] = record.image
  unknown = [key for key in predictions if key not in images]
  if unknown:
    raise ValueError(f"{len(unknown)} predictions are not in the data, the first is {unknown[0]!r}")
  if missing and not config.subset:
    raise ValueError(
      f"{len(missing)} of {len(missing) + len(samples)} samples have no prediction, the first is"
      f" {missing[0]!r} (--subset scores the others)"
    )
  results = score_samples(samples, **header)
  write_results(results, config.out)
  write_report(results, config.out, images, max_pictures=config.pictures)
  return results


def main() -> None:
  """Command line."""
  config = cli.parse(ScoreConfig, sys.argv[1:], "python -m eval.score")
  results = score(config)
  print(f"{headline(results)}  ({results['total_samples']} samples)")
  print(f"written to {config.out}")


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
  """Objects of a file as masks; phrase and number come from the text."""
  by_index = {m.index: m for m in mentions(text)}
  masks = []
  for position, item in enumerate(objects):
    if not isinstance(item, Mapping):
      raise TypeError("objects must be a list of objects")
    index = item.get("index", position)
    mask = PredictedMask(item["rle"], item["role"], index, score=item.get("score"))
    if index in by_index:
      mention = by_index[index]
      mask = dataclasses.replace(
        mask,
        phrase=mention.phrase,
        text_span=mention.text_span,
        object_number=mention.object_number,
      )
    masks.append(mask)
  return masks


if __name__ == "__main__":
  cli.run(main)
