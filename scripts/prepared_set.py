"""The folder of a prepared data set: unfinished beside its name, complete under it.

Used by `scripts.prepare_data`. `vrt80k/1.0.0.partial` holds finished shards and a report for each;
with TFDS's metadata it becomes `vrt80k/1.0.0`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from scripts.prepared_shards import BUILDERS, Kind, ShardReport, ShardTask
from vrt_jax.data.checks import Drop, Verify
from vrt_jax.data.sources import (
  EVAL_SPLIT,
  KEYS_FILE,
  TRAIN_SPLIT,
  ArrayRecordFiles,
  Source,
  eval_source,
  train_source,
)
from vrt_jax.data.tf_example import read_bytes_feature

SPLITS = {"train": TRAIN_SPLIT, "eval": EVAL_SPLIT}
REPORT_FILE = "report.json"
PROGRESS, LOCK = "progress", "lock"


@dataclass(frozen=True)
class Report:
  """What became of all records."""

  kind: Kind
  verify: Verify
  thinking: bool
  sources: list[tuple[str, int, int]]
  """(path, bytes, time of change in ns) of every TFRecord file, in order."""
  records_read: int
  records_written: int
  drops: dict[str, Drop]
  duplicate_keys: int
  """Records whose key an earlier one has; they are kept."""
  bytes: int
  """Of the ArrayRecord files."""
  seconds: float
  """Of work, summed over workers."""

  @property
  def dropped(self) -> int:
    """Records that were read and not written."""
    return self.records_read - self.records_written


def combine(reports: Sequence[ShardReport]) -> Report:
  """One report of all shards, reasons with the most records first."""
  drops: dict[str, Drop] = {}
  for reason, drop in (item for report in reports for item in report.drops.items()):
    total = drops.setdefault(reason, Drop(0, drop.key, drop.detail))
    total.count += drop.count
  written = sum(report.written for report in reports)
  distinct = len({key for report in reports for key in report.keys})
  return Report(
    kind=reports[0].kind,
    verify=reports[0].verify,
    thinking=reports[0].thinking,
    sources=[(r.source, r.size, r.mtime_ns) for r in reports],
    records_read=sum(r.read for r in reports),
    records_written=written,
    drops=dict(sorted(drops.items(), key=lambda item: -item[1].count)),
    duplicate_keys=written - distinct,
    bytes=sum(r.bytes for r in reports),
    seconds=round(sum(r.seconds for r in reports), 1),
  )


@dataclass(frozen=True)
class SetFolder:
  """Where the parts of a data set of one kind lie below `out`."""

  out: Path
  kind: Kind

  @property
  def final(self) -> Path:
    """The folder of the complete set: that of the TFDS builder."""
    return Path(BUILDERS[self.kind](data_dir=os.fspath(self.out)).data_path)

  @property
  def partial(self) -> Path:
    """The folder of an unfinished set."""
    return self.final.with_name(f"{self.final.name}.partial")

  def _template(self) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
      data_dir=self.partial,
      dataset_name=BUILDERS[self.kind].name,
      split=SPLITS[self.kind],
      filetype_suffix=tfds.core.FileFormat.ARRAY_RECORD.file_suffix,
    )

  def tasks(self, sources: Sequence[str], verify: Verify, thinking: bool) -> list[ShardTask]:
    """One task a source file."""
    template = self._template()
    return [
      ShardTask(
        source=os.path.abspath(source),
        target=os.fspath(template.sharded_filepath(shard_index=i, num_shards=len(sources))),
        report=os.fspath(self.partial / PROGRESS / f"{i:05}.json"),
        kind=self.kind,
        verify=verify,
        thinking=thinking,
      )
      for i, source in enumerate(sources)
    ]

  @contextlib.contextmanager
  def locked(self, tasks: Sequence[ShardTask]) -> Iterator[None]:
    """Holds the unfinished folder for this run, without what no task expects there.

    Raises:
      ValueError: another run holds it.
    """
    (self.partial / PROGRESS).mkdir(parents=True, exist_ok=True)
    lock = self.partial / LOCK
    with open(lock, "w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(f"another run is writing to {self.partial}") from None
      expected = {path for task in tasks for path in (task.target, task.report)}
      expected |= {os.fspath(lock), os.fspath(self.partial / PROGRESS)}
      for path in [*self.partial.iterdir(), *(self.partial / PROGRESS).iterdir()]:
        if os.fspath(path) not in expected:
          path.unlink()
      yield

  def complete(self, reports: Sequence[ShardReport], report: Report) -> None:
    """Writes keys, report and TFDS's metadata, reads the set back and gives it its name.

    Raises:
      ValueError: the set reads otherwise than the reports say.
    """
    keys = [key for shard in reports for key in shard.keys]
    _write_json(self.partial / KEYS_FILE, keys)
    _write_json(self.partial / REPORT_FILE, dataclasses.asdict(report))
    split = tfds.core.SplitInfo(
      name=SPLITS[self.kind],
      shard_lengths=[shard.written for shard in reports],
      num_bytes=report.bytes,
      filename_template=self._template(),
    )
    info = BUILDERS[self.kind](data_dir=os.fspath(self.out)).info
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(self.partial)
    self._verify(reports, keys)
    (self.partial / LOCK).unlink()
    os.rename(self.partial, self.final)
    shutil.rmtree(self.final / PROGRESS)

  def _verify(self, reports: Sequence[ShardReport], keys: Sequence[str]) -> None:
    """The set as users open it: number of records, and the first and last key of each shard."""
    source = self.open(self.partial)
    if len(source) != len(keys):
      raise ValueError(f"{self.partial} holds {len(source)} records instead of {len(keys)}")
    start = 0
    for shard in reports:
      for index in {start, start + shard.written - 1} if shard.written else ():
        found = read_bytes_feature(*source.raw.reader(index), "key").decode()
        if found != keys[index]:
          raise ValueError(f"record {index} of {self.partial} is {found}, not {keys[index]}")
      start += shard.written

  def open(self, folder: Path) -> Source:
    """The records of the set in `folder`."""
    source = train_source(folder) if self.kind == "train" else eval_source(folder)
    assert isinstance(source.raw, ArrayRecordFiles)
    return source

  def existing_report(self) -> Report | None:
    """The report of the complete set; None where there is no complete set.

    Raises:
      ValueError: there is one that this command did not write.
    """
    if not self.final.exists():
      return None
    try:
      fields = json.loads((self.final / REPORT_FILE).read_text(encoding="utf-8"))
      fields["drops"] = {reason: Drop(**drop) for reason, drop in fields["drops"].items()}
      fields["sources"] = [tuple(source) for source in fields["sources"]]
      return Report(**fields)
    except (OSError, json.JSONDecodeError, TypeError, KeyError):
      raise ValueError(f"{self.final} exists: delete it or choose another --out") from None


def _write_json(path: Path, value: object) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
