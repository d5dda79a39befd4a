"""Writes the shapes world to TFRecord files.

Usage: python -m scripts.make_shapes --out DIR --train N --eval M --seed S
  [--task trace|refer|single]
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from vrt_jax.data.records import TFRecordSource
from vrt_jax.data.shapes import write_shapes


@dataclass(frozen=True)
class Args:
  """Writes the shapes world in the VRT-80k and the VRT-Eval record layout."""

  out: str
  """Folder to write to."""
  train: int = 10000
  """Training samples."""
  eval: int = 300
  """Evaluation samples (trace task only)."""
  seed: int = 0
  task: Literal["trace", "refer", "single"] = "trace"
  """Reasoning questions with traces, or requests (for several objects, for one) without."""
  shards: int = 1
  """Files the training samples are spread over."""
  workers: int | None = None
  """Processes; one a CPU unless given."""


def main(args: Args) -> None:
  """Writes the files and prints what each holds."""
  num_eval = args.eval if args.task == "trace" else 0
  paths = write_shapes(
    args.out, args.train, num_eval, args.seed, args.task, args.shards, args.workers
  )
  for path in paths:
    print(f"{path}: {len(TFRecordSource(path))} records")


if __name__ == "__main__":
  main(tyro.cli(Args))
