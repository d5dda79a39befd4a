"""Random access to the records of a data set, wherever it is stored.

    source = train_source("VRT-80k/*.tfrecord")  # or the folder that prepare_data wrote
    source[7]  # a TrainRecord
    source.keys()  # the keys of all records, without reading their pictures

A data set is TFRecord files in a record layout of VRT, or a folder of ArrayRecord files that TFDS
describes; both hold the same tf.Example.
"""

import bisect
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from vrt_jax.data.records import EvalRecord, TrainRecord, parse_eval, parse_train
from vrt_jax.data.tf_example import ReadAt, read_bytes_feature
from vrt_jax.data.tfrecord import TFRecordSource

TRAIN_NAME, TRAIN_SPLIT = "vrt80k", "train"
EVAL_NAME, EVAL_SPLIT = "vrt_eval", "test"
KEYS_FILE = "keys.json"

Record = TypeVar("Record", TrainRecord, EvalRecord)


class ArrayRecordFiles:
  """Random access to the serialised records of one split of a prepared TFDS data set.

  Picklable, and safe to read from several threads. Raises ValueError where a file is missing.
  """

  def __init__(self, folder: str | os.PathLike, split: str):
    # both take a moment to import and are needed for such folders only
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self.folder = os.fspath(folder)
    splits = tfds.builder_from_directory(self.folder).info.splits
    if split not in splits:
      raise ValueError(f"{self.folder} has no split {split!r}, it has {', '.join(sorted(splits))}")
    parts = splits[split].file_instructions
    if missing := [part.filename for part in parts if not os.path.isfile(part.filename)]:
      raise ValueError(
        f"{len(missing)} files of {self.folder} are missing, the first: {missing[0]}"
      )
    if not parts:
      raise ValueError(f"{self.folder} holds no records")
    self.paths = [part.filename for part in parts]
    self._ends = list(itertools.accumulate(part.take for part in parts))
    self._records = ArrayRecordDataSource(parts)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> bytes:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    try:
      return self._records[index]
    except (RuntimeError, IndexError, ValueError) as error:
      reason = (str(error) or "unreadable").splitlines()[0]
      path = self.paths[bisect.bisect_right(self._ends, index)]
      raise ValueError(f"corrupt record: record {index}, in {path}: {reason}") from None

  def reader(self, index: int) -> tuple[ReadAt, int]:
    """(read, size): pieces of record `index`."""
    data = self[index]
    return lambda at, count: data[at : at + count], len(data)

  def stored_keys(self) -> list[str] | None:
    """The keys that were written beside the records; None where there are none or too few."""
    path = Path(self.folder, KEYS_FILE)
    if not path.is_file():
      return None
    keys = json.loads(path.read_text(encoding="utf-8"))
    return keys if isinstance(keys, list) and len(keys) == len(self) else None

  def __repr__(self) -> str:
    return f"ArrayRecordFiles({self.folder}, {len(self)} records)"


@dataclass(frozen=True)
class Source(Sequence, Generic[Record]):
  """Random access to records, for `grain.MapDataset.source`; picklable and thread-safe.

  `source[i]` raises ValueError("reason: detail") where record i is damaged or malformed.
  """

  raw: TFRecordSource | ArrayRecordFiles
  """The serialised tf.Examples."""
  parse: Callable[[bytes], Record]

  def __len__(self) -> int:
    return len(self.raw)

  def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
    return self.parse(self.raw[index])

  def keys(self) -> list[str]:
    """The key of every record in order, "" where a record is too damaged to have one.

    Neither pictures nor annotations are parsed. Of TFRecord files a few dozen bytes a record are
    read; a set that `scripts.prepare_data` wrote has its keys in a file; other ArrayRecord files
    are read in full.
    """
    stored = self.raw.stored_keys() if isinstance(self.raw, ArrayRecordFiles) else None
    return stored if stored is not None else [self._key(i) for i in range(len(self))]

  def _key(self, index: int) -> str:
    try:
      return read_bytes_feature(*self.raw.reader(index), "key").decode()
    except ValueError:
      return ""


def prepared_folder(data: str | os.PathLike, name: str) -> Path:
  """The folder with the `dataset_info.json` of the data set `name` at or below `data`.

  `data` may be that folder, its parent or the `data_dir` of TFDS; of several versions the newest.
  Raises ValueError where there is none.
  """
  found = _found(Path(data), name)
  if not found:
    raise ValueError(
      f"{data} holds no {name} data set: write one with python -m scripts.prepare_data, or give "
      f"the TFRecord files themselves, as in '{data}/*.tfrecord'"
    )
  return max(found, key=_version_of)


def is_prepared(data: str | os.PathLike, name: str) -> bool:
  """Whether `prepared_folder` finds the data set `name` there."""
  return bool(_found(Path(data), name))


def _found(folder: Path, name: str) -> list[Path]:
  infos = [folder / "dataset_info.json"]
  for parent in (folder, folder / name):
    infos += (path for path in parent.glob("*/dataset_info.json") if _version_of(path.parent))
  return [path.parent for path in infos if path.is_file() and _name_of(path) == name]


def _name_of(info: Path) -> Any:
  try:
    return json.loads(info.read_text(encoding="utf-8")).get("name")
  except json.JSONDecodeError:
    raise ValueError(f"{info} is not JSON") from None


def _version_of(folder: Path) -> tuple[int, ...]:
  numbers = folder.name.split(".")
  return tuple(map(int, numbers)) if all(n.isdigit() for n in numbers) else ()


def _open(data: str, name: str, split: str) -> TFRecordSource | ArrayRecordFiles:
  if os.path.isdir(data):
    return ArrayRecordFiles(prepared_folder(data, name), split)
  return TFRecordSource(data)


def train_source(data: str | os.PathLike) -> Source[TrainRecord]:
  """The training records of TFRecord files (a path or glob) or of a prepared folder.

  Raises ValueError where nothing matches, or a file's framing is broken.
  """
  return Source(_open(os.fspath(data), TRAIN_NAME, TRAIN_SPLIT), parse_train)


def eval_source(data: str | os.PathLike) -> Source[EvalRecord]:
  """The evaluation records of TFRecord files (a path or glob) or of a prepared folder.

  Raises ValueError where nothing matches, or a file's framing is broken.
  """
  return Source(_open(os.fspath(data), EVAL_NAME, EVAL_SPLIT), parse_eval)


def eval_records(data: str | os.PathLike, num_samples: int) -> list[EvalRecord]:
  """The first `num_samples` evaluation records, fewer where there are fewer; all for 0.

  Raises ValueError as `eval_source`, and for a record that is damaged.
  """
  source = eval_source(data)
  return [source[i] for i in range(min(num_samples or len(source), len(source)))]
