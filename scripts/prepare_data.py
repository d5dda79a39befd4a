"""VRT-80k or VRT-Eval TFRecord files -> a checked TFDS data set of ArrayRecord files.

python -m scripts.prepare_data --src 'VRT-80k/*.tfrecord' --out data
python -m scripts.prepare_data --src 'VRT-Eval/*.tfrecord' --out data --kind eval

Pictures keep their bytes. A run that was stopped goes on where it was; nothing can be loaded
before all of it is written and read back.
"""

import concurrent.futures
import ctypes
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from vrt_jax import cli
from vrt_jax.cores import usable_cores

if TYPE_CHECKING:
  from scripts.prepared_set import Report
  from scripts.prepared_shards import ShardReport, ShardTask

POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Args:
  """Writes a checked data set that training and evaluation read at random."""

  src: str
  """Path or glob of the TFRecord files."""
  out: Path
  """Data folder; the set becomes OUT/vrt80k/1.0.0 or OUT/vrt_eval/1.0.0."""
  kind: Literal["train", "eval"] = "train"
  """Record layout: VRT-80k or VRT-Eval."""
  verify: Literal["header", "full"] = "header"
  """Of each picture read the header, or decode every pixel."""
  thinking: bool = True
  """Drop training records without reasoning; --no-thinking takes the answer alone, to train with
  data.thinking off."""
  num_workers: int | None = None
  """Processes, each for one source file at a time; one a usable core unless given, 0 for none."""
  max_bad_share: float = 0.05
  """Records that may be unusable, as a share; more is an error."""


class _Stopped(ValueError):
  """The run ends, a worker leaves its shard."""


def _watch_parent() -> None:
  """A worker whose parent was killed must not go on writing beside the next run."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)


@dataclass(frozen=True)
class _Shared:
  """What parent and workers tell each other; without locks, which a killed worker would keep."""

  read_bytes: ctypes.Array
  """Of each task; its worker alone writes it."""
  stop: ctypes.c_bool
  """Whether workers are to leave their shards."""

  @classmethod
  def create(cls, context: BaseContext, num_tasks: int) -> "_Shared":
    """Nothing read, not stopped."""
    return cls(context.RawArray(ctypes.c_int64, num_tasks), context.RawValue(ctypes.c_bool, False))


_shared: list[_Shared] = []
"""In a worker."""


def _start_worker(shared: _Shared) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
  threading.Thread(target=_watch_parent, daemon=True).start()
  _shared[:] = [shared]


def _tick(index: int, num_bytes: int) -> None:
  shared = _shared[0]
  shared.read_bytes[index] += num_bytes
  if shared.stop.value:
    raise _Stopped("stopped")


def _work(index: int, task: "ShardTask") -> "ShardReport":
  from scripts.prepared_shards import prepare_shard

  return prepare_shard(task, functools.partial(_tick, index))


def _reports_of_processes(
  tasks: Sequence["ShardTask"], num_workers: int, bar: tqdm
) -> Iterator[tuple["ShardTask", "ShardReport | ValueError"]]:
  """Finished shards as they come, an error for each that cannot be read."""
  context = multiprocessing.get_context("spawn")
  shared = _Shared.create(context, len(tasks))
  pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _start_worker, (shared,))
  begun = bar.n
  try:
    waiting = {pool.submit(_work, i, task): task for i, task in enumerate(tasks)}
    while waiting:
      done, _ = concurrent.futures.wait(waiting, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
      bar.update(begun + sum(shared.read_bytes) - bar.n)
      for future in done:
        task = waiting.pop(future)
        try:
          yield task, future.result()
        except ValueError as error:
          yield task, error
  except BrokenProcessPool:
    raise ValueError(
      "a worker process died (killed, or out of memory); run the same command again to go on"
    ) from None
  finally:
    shared.stop.value = True
    pool.shutdown(cancel_futures=True)


def _reports_of_this_process(
  tasks: Sequence["ShardTask"], bar: tqdm
) -> Iterator[tuple["ShardTask", "ShardReport | ValueError"]]:
  from scripts.prepared_shards import prepare_shard

  for task in tasks:
    try:
      yield task, prepare_shard(task, bar.update)
    except ValueError as error:
      yield task, error


def _check_share(reports: Sequence["ShardReport"], limit: float, share_done: float) -> None:
  """Raises ValueError where too many records are unusable, even if all that remain are good."""
  from scripts.prepared_set import combine
  from vrt_jax.data.checks import drop_lines

  read = sum(report.read for report in reports)
  dropped = read - sum(report.written for report in reports)
  if dropped > limit * read / share_done:
    reasons = "; ".join(line.strip() for line in drop_lines(combine(reports).drops))
    raise ValueError(
      f"{dropped} of {read} records are unusable, more than --max-bad-share {limit:g}: {reasons}"
    )


def _prepare_shards(args: Args, tasks: Sequence["ShardTask"]) -> list["ShardReport"]:
  """The reports of all shards in order; those that are done are not done again.

  Raises:
    ValueError: names every source that cannot be read, or too many records are unusable.
  """
  from scripts.prepared_shards import finished

  sizes = {task: os.path.getsize(task.source) for task in tasks}
  reports = {task: report for task in tasks if (report := finished(task))}
  todo = [task for task in tasks if task not in reports]
  need, free = sum(sizes[task] for task in todo), shutil.disk_usage(args.out).free
  if need > free:
    raise OSError(f"no space: {need / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free at {args.out}")
  if reports:
    print(f"{len(reports)} of {len(tasks)} shards are done already")
  damaged = []
  done = sum(sizes[task] for task in reports)
  num_workers = usable_cores() if args.num_workers is None else args.num_workers
  _check_share([*reports.values()], args.max_bad_share, max(1, done) / sum(sizes.values()))
  with tqdm(total=sum(sizes.values()), initial=done, unit="B", unit_scale=True) as bar:
    results = _reports_of_this_process(todo, bar)
    if num_workers:
      results = _reports_of_processes(todo, min(num_workers, len(todo) or 1), bar)
    for task, result in results:
      if isinstance(result, ValueError):
        damaged.append(str(result))
        continue
      reports[task] = result
      done += sizes[task]
      bar.set_postfix(shards=f"{len(reports)}/{len(tasks)}")
      _check_share([*reports.values()], args.max_bad_share, done / bar.total)
  if damaged:
    raise ValueError(f"{len(damaged)} of {len(tasks)} files are damaged: {'; '.join(damaged)}")
  return [reports[task] for task in tasks]


def describe(report: "Report") -> str:
  """The report as a table."""
  from vrt_jax.data.checks import drop_lines

  share = report.dropped / max(1, report.records_read)
  lines = [
    f"{report.records_read:>9,}  records read from {len(report.sources)} files",
    f"{report.records_written:>9,}  written, {report.bytes / 1e6:,.1f} MB",
    f"{report.dropped:>9,}  dropped ({share:.2%})",
    *("  " + line for line in drop_lines(report.drops)),
  ]
  if report.duplicate_keys:
    lines.append(f"{report.duplicate_keys:>9,}  kept although an earlier record has their key")
  return "\n".join(lines)


def main(args: Args) -> None:
  """Prepares the set, or says that it is there."""
  from scripts.prepared_set import SetFolder, combine
  from vrt_jax.data.tfrecord import expand

  if not 0 <= args.max_bad_share <= 1:
    raise ValueError(f"--max-bad-share must be a share from 0 to 1, not {args.max_bad_share}")
  if args.num_workers is not None and args.num_workers < 0:
    raise ValueError(f"--num-workers must be 0 or more, not {args.num_workers}")
  started = time.monotonic()
  sources = [os.path.abspath(path) for path in expand(args.src)]
  folder = SetFolder(args.out.absolute(), args.kind)
  if existing := folder.existing_report():
    stamps = [(path, os.stat(path)) for path in sources]
    if existing.sources != [(path, s.st_size, s.st_mtime_ns) for path, s in stamps]:
      raise ValueError(f"{folder.final} holds other files' records: choose another --out")
    print(f"{folder.final} is complete already")
    print(describe(existing))
    return
  args.out.mkdir(parents=True, exist_ok=True)
  tasks = folder.tasks(sources, args.verify, args.thinking)
  with folder.locked(tasks):
    reports = _prepare_shards(args, tasks)
    report = combine(reports)
    if not report.records_written:
      raise ValueError(f"no usable record in {args.src}")
    folder.complete(reports, report)
  print(describe(report))
  print(f"{time.monotonic() - started:>9,.1f}  seconds; {folder.final}")


if __name__ == "__main__":
  cli.run(lambda: main(cli.parse(Args, sys.argv[1:], "python -m scripts.prepare_data", __doc__)))
