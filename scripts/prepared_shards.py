"""One TFRecord shard -> one ArrayRecord shard with a report beside it, whole or not at all.

Used by `scripts.prepare_data`, in worker processes. A record is checked, written as TFDS serialises
it and read back; one that cannot be used is counted by its reason.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from vrt_jax.data.checks import Drop, Verify, check_eval_record, check_train_record, count_drop
from vrt_jax.data.records import parse_eval, parse_train
from vrt_jax.data.tf_example import read_bytes_feature
from vrt_jax.data.tfds_builders import Vrt80k, VrtEval, encode_eval, encode_train
from vrt_jax.data.tfrecord import TFRecordSource

Kind = Literal["train", "eval"]
BUILDERS: dict[Kind, type[Vrt80k] | type[VrtEval]] = {"train": Vrt80k, "eval": VrtEval}

Tick = Callable[[int], None]
"""Takes the bytes of each record that was read."""


@dataclass(frozen=True)
class ShardTask:
  """What to do with one source file."""

  source: str
  target: str
  report: str
  """JSON file that says the shard is done."""
  kind: Kind
  verify: Verify
  thinking: bool


@dataclass
class ShardReport:
  """What became of the records of one source file."""

  source: str
  size: int
  mtime_ns: int
  """Of the source: another file under its name is prepared anew."""
  kind: Kind
  verify: Verify
  thinking: bool
  read: int = 0
  written: int = 0
  bytes: int = 0
  """Of the shard that was written."""
  seconds: float = 0.0
  drops: dict[str, Drop] = dataclasses.field(default_factory=dict)
  keys: list[str] = dataclasses.field(default_factory=list)

  @classmethod
  def begin(cls, task: ShardTask) -> "ShardReport":
    """An empty report that knows its source."""
    status = os.stat(task.source)
    settings = task.kind, task.verify, task.thinking
    return cls(task.source, status.st_size, status.st_mtime_ns, *settings)

  @property
  def identity(self) -> tuple:
    """What must be the same for a finished shard to be kept."""
    return self.source, self.size, self.mtime_ns, self.kind, self.verify, self.thinking


def finished(task: ShardTask) -> ShardReport | None:
  """The report of a shard that is done: same source, same settings, the file in place."""
  try:
    fields = json.loads(Path(task.report).read_text(encoding="utf-8"))
    drops = {reason: Drop(**drop) for reason, drop in fields.pop("drops").items()}
    report = ShardReport(drops=drops, **fields)
    in_place = os.path.getsize(task.target) == report.bytes
  except (OSError, json.JSONDecodeError, TypeError, KeyError, AttributeError):
    return None
  same = report.identity == ShardReport.begin(task).identity
  return report if same and in_place else None


def prepare_shard(task: ShardTask, tick: Tick) -> ShardReport:
  """Writes one shard and its report; both appear under their names when they are complete.

  Raises:
    ValueError: names the source, where its framing is broken or what was written reads otherwise.
  """
  started = time.monotonic()
  report = ShardReport.begin(task)
  source = TFRecordSource(task.source)
  with _appearing(task.target) as temporary:
    writer = tfds.core.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD)
    writer.write(temporary, enumerate(_serialized(source, task, report, tick)))
    _read_back(temporary, report)
    report.bytes = os.path.getsize(temporary)
  source.close()
  report.seconds = time.monotonic() - started
  with _appearing(task.report) as temporary:
    Path(temporary).write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
  return report


def _serialized(
  source: TFRecordSource, task: ShardTask, report: ShardReport, tick: Tick
) -> Iterator[bytes]:
  """The usable records as TFDS stores them; fills the report."""
  features = BUILDERS[task.kind](data_dir=os.path.dirname(task.target)).info.features
  for index in range(len(source)):
    report.read += 1
    key = f"record {index}"
    read, size = source.reader(index)
    tick(size)
    with contextlib.suppress(ValueError):  # the error comes again when all of it is parsed
      key = read_bytes_feature(read, size, "key").decode()
    try:
      data = source[index]
      if task.kind == "train":
        train = parse_train(data)
        check_train_record(train, task.verify, task.thinking)
        found, encoded = train.key, encode_train(train)
      else:
        held_out = parse_eval(data)
        check_eval_record(held_out, task.verify)
        found, encoded = held_out.key, encode_eval(held_out)
    except ValueError as error:
      count_drop(report.drops, key, error)
      continue
    report.written += 1
    report.keys.append(found)
    yield features.serialize_example(encoded)


def _read_back(path: str, report: ShardReport) -> None:
  """Reads every record of a written shard: their number and keys must be the report's."""
  records = ArrayRecordDataSource([path])
  keys = []
  for data in records:

    def read(at: int, count: int, data: bytes = data) -> bytes:
      return data[at : at + count]

    keys.append(read_bytes_feature(read, len(data), "key").decode())
  if keys != report.keys:
    raise ValueError(
      f"{report.source}: {len(report.keys)} records were written, but {len(keys)} read back, or "
      "with other keys: is the disk damaged?"
    )


@contextlib.contextmanager
def _appearing(path: str) -> Iterator[str]:
  """A temporary name that becomes `path`; after an error nothing is left."""
  temporary = f"{path}.{os.getpid()}.tmp"
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
