"""Looks at a data set: one record as text and picture, or all records checked and counted.

python -m scripts.inspect_data --data 'VRT-80k/*.tfrecord' --index 7 --out record.png
python -m scripts.inspect_data --data data --key photo_cars_0
python -m scripts.inspect_data --data data --verify
"""

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from vrt_jax import cli
from vrt_jax.cores import usable_cores

if TYPE_CHECKING:
  from scripts.record_view import Tally
  from vrt_jax.data.sources import Source

CHUNK_RECORDS = 16


@dataclass(frozen=True)
class Args:
  """Shows a record, or checks all of them."""

  data: str
  """Path or glob of TFRecord files, or the folder of a prepared set."""
  kind: Literal["train", "eval"] | None = None
  """Record layout; found out unless given."""
  index: int | None = None
  """Place of the record to show; the first unless given."""
  key: str | None = None
  """Key of the record to show."""
  out: Path | None = None
  """Picture file for the record with its masks."""
  verify: bool = False
  """Check every record and print statistics."""
  pictures: Literal["header", "full"] = "header"
  """With --verify: of each picture read the header, or decode every pixel."""
  thinking: bool = True
  """--no-thinking: training records need no reasoning."""
  max_bad_share: float = 0.05
  """With --verify: records that may be unusable, as a share; more is exit status 1."""
  num_workers: int | None = None
  """With --verify: processes; one a usable core unless given, 0 for none."""


def open_source(data: str, kind: str | None) -> tuple["Source", str]:
  """(source, kind) of a data set; the kind is read off the set where it is None.

  Raises ValueError where there is no data, or its layout is neither of the two.
  """
  from vrt_jax.data.records import parse_example
  from vrt_jax.data.sources import EVAL_NAME, TRAIN_NAME, eval_source, is_prepared, train_source

  if kind is None and os.path.isdir(data):
    found = [
      k for k, name in (("train", TRAIN_NAME), ("eval", EVAL_NAME)) if is_prepared(data, name)
    ]
    if len(found) > 1:
      raise ValueError(f"{data} holds a training and an evaluation set: choose one with --kind")
    kind = found[0] if found else "train"  # where there is none, opening says so
  if kind is None:
    source = train_source(data)
    features = parse_example(source.raw[0])
    kind = "train" if "json" in features else "eval"
  return (train_source(data) if kind == "train" else eval_source(data)), kind


def _choose(source: "Source", args: Args) -> int:
  if args.key is None:
    index = args.index or 0
    if not 0 <= index < len(source):
      raise ValueError(f"there is no record {index}, the places are 0 to {len(source) - 1}")
    return index
  if args.index is not None:
    raise ValueError("give either --index or --key")
  keys = source.keys()
  if args.key not in keys:
    raise ValueError(f"no record has the key {args.key!r}; the first is {keys[0]!r}")
  return keys.index(args.key)


def show(source: "Source", kind: str, args: Args) -> None:
  """Prints a record, and draws it where asked.

  Raises ValueError("reason: detail") where the record cannot be used.
  """
  from scripts.record_view import draw, eval_view, text_of, train_view

  index = _choose(source, args)
  record = source[index]
  if kind == "train":
    view = train_view(record, args.thinking)
  else:
    view = eval_view(record)
  print(f"record {index} of {len(source)}")
  print(text_of(view))
  if args.out:
    draw(view, record.image).save(args.out)
    print(f"\n{args.out}")


def _ranges(count: int) -> list[tuple[int, int]]:
  return [(i, min(i + CHUNK_RECORDS, count)) for i in range(0, count, CHUNK_RECORDS)]


def _tallies(source: "Source", kind: str, args: Args) -> Iterator["Tally"]:
  """The tallies of short ranges of records, in order."""
  from scripts.record_view import tally

  ranges = _ranges(len(source))
  workers = usable_cores() if args.num_workers is None else args.num_workers
  workers = min(workers or 0, len(ranges))
  common = (source, kind, args.pictures, args.thinking)
  if workers < 2:
    for start, stop in ranges:
      yield tally(*common, start, stop)
    return
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(workers, context, _start_worker, common) as pool:
    try:
      yield from pool.map(_tally_in_worker, ranges)
    finally:
      pool.shutdown(cancel_futures=True)


_common: list[Any] = []
"""In a worker: the arguments that all ranges share."""


def _start_worker(*common: object) -> None:
  _common[:] = common


def _tally_in_worker(span: tuple[int, int]) -> "Tally":
  from scripts.record_view import tally

  source, kind, verify, thinking = _common
  return tally(source, kind, verify, thinking, *span)


def verify(source: "Source", kind: str, args: Args) -> None:
  """Checks every record and prints counts and statistics.

  Raises ValueError where more records are unusable than allowed.
  """
  from scripts.record_view import statistics
  from vrt_jax.data.checks import Drop, RecordFacts, drop_lines

  facts: list[RecordFacts] = []
  drops: dict[str, Drop] = {}
  with tqdm(total=len(source), unit=" records") as bar:
    for part in _tallies(source, kind, args):
      facts += part.facts
      for reason, drop in part.drops.items():
        drops.setdefault(reason, dataclasses.replace(drop, count=0)).count += drop.count
      bar.update(len(part.facts) + sum(drop.count for drop in part.drops.values()))
  keys = source.keys()
  dropped = sum(drop.count for drop in drops.values())
  lines: Sequence[str] = [
    f"{len(source):>9,}  {kind} records",
    f"{len(facts):>9,}  usable",
    f"{dropped:>9,}  unusable ({dropped / len(source):.2%})",
    *("  " + line for line in drop_lines(drops)),
    f"{len(keys) - len(set(keys)):>9,}  records whose key an earlier one has",
  ]
  print("\n".join([*lines, *statistics(facts)]))
  if dropped > args.max_bad_share * len(source):
    raise ValueError(
      f"{dropped} of {len(source)} records are unusable, more than --max-bad-share "
      f"{args.max_bad_share:g}"
    )


def main(args: Args) -> None:
  """Shows or verifies."""
  source, kind = open_source(args.data, args.kind)
  if args.verify:
    if args.index is not None or args.key is not None or args.out is not None:
      raise ValueError("--verify looks at all records: leave out --index, --key and --out")
    verify(source, kind, args)
  else:
    show(source, kind, args)


if __name__ == "__main__":
  cli.run(lambda: main(cli.parse(Args, sys.argv[1:], "python -m scripts.inspect_data", __doc__)))
