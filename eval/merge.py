"""Joins the results of shards.

    python -m eval.merge --results DIR DIR DIR --data 'VRT-Eval/*.tfrecord' --out DIR

Each DIR is the --out of an `eval.vrt_bench --shard I/N`. The numbers are those of one run over all
records, to the last digit, since they are computed from the samples again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report import write_report
from vrt_jax import cli
from vrt_jax.data.sources import eval_records
from vrt_jax.evaluate import headline
from vrt_jax.metrics.results import RESULTS_FILE, results_of, write_results


@dataclass(frozen=True)
class Args:
  """Joins the results of shards into those of the whole."""

  results: tuple[Path, ...]
  """Folders of the shards, in any order."""
  data: str
  """The records of all shards, as given to them."""
  out: Path
  """Folder for the results file and the report."""
  num_samples: int = 0
  """As given to the shards."""


def merge(args: Args) -> dict[str, Any]:
  """Reads, joins and writes; returns the content of the results file.

  Raises:
    ValueError: the shards are of different models or settings, overlap, or leave records out.
  """
  parts = [read_results(folder) for folder in args.results]
  for name in ("config_hash", "model_path", "code_version", "seed"):
    values = {json.dumps(part.get(name)) for part in parts}
    if len(values) > 1:
      raise ValueError(f"the shards have different values of {name}: {', '.join(sorted(values))}")
  details: dict[str, dict] = {}
  for folder, part in zip(args.results, parts, strict=True):
    for detail in part["detailed_results"]:
      key = detail["sample_info"]["key"]
      if key in details:
        raise ValueError(f"{folder}: sample {key!r} is in another shard too")
      details[key] = detail
  records = eval_records(args.data, args.num_samples)
  missing = [record.key for record in records if record.key not in details]
  if missing or len(records) != len(details):
    raise ValueError(
      f"the shards have {len(details)} samples, the data {len(records)}"
      + (f"; the first without a result is {missing[0]!r}" if missing else "")
    )
  first = parts[0]
  results = results_of(
    [details[record.key] for record in records],
    first["config_hash"],
    model_path=first["model_path"],
    seed=first["seed"],
  )
  write_results(results, args.out)
  write_report(results, args.out, {record.key: record.image for record in records})
  return results


def read_results(folder: Path) -> dict[str, Any]:
  """The results file of a folder; ValueError where there is none."""
  path = folder / RESULTS_FILE
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read ({error})") from error
  if not isinstance(found, dict) or not isinstance(found.get("detailed_results"), list):
    raise ValueError(f"{path} is not a results file")
  return found


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m eval.merge", __doc__)
  results = merge(args)
  print(f"{headline(results)}  ({results['total_samples']} samples)")
  print(f"written to {args.out}")


if __name__ == "__main__":
  cli.run(main)
