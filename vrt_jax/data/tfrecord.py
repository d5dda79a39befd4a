"""TFRecord files without TensorFlow: an atomic writer and a random-access source.

Format (tensorflow/core/lib/io/record_writer.h): a record is a little-endian uint64 length, the
masked crc32c of those 8 bytes, the data, and the masked crc32c of the data.
"""

import bisect
import glob
import os
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from types import TracebackType

import google_crc32c
import numpy as np
from jaxtyping import Int64

from vrt_jax.data.tf_example import ReadAt

_HEADER = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_SETTLED_SECONDS = 2
"""A file changed less than this ago may change again within the resolution of its time stamp."""


def _masked_crc(data: bytes) -> int:
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class TFRecordWriter:
  """Writes a TFRecord file; the file appears under its name only when the block succeeds."""

  def __init__(self, path: str | os.PathLike):
    self.path = os.fspath(path)

  def __enter__(self) -> "TFRecordWriter":
    folder, name = os.path.split(self.path)
    handle, self._temp = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    self._file = os.fdopen(handle, "wb")
    return self

  def write(self, data: bytes) -> None:
    """Appends one record."""
    length = struct.pack("<Q", len(data))
    self._file.write(length + _CRC.pack(_masked_crc(length)) + data + _CRC.pack(_masked_crc(data)))

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._file.close()
    if kind is None:
      umask = os.umask(0)
      os.umask(umask)
      os.chmod(self._temp, 0o666 & ~umask)
      os.replace(self._temp, self.path)
    else:
      os.unlink(self._temp)


def _scan(path: str) -> Int64[np.ndarray, "N"]:
  """Byte offsets of the records of a file; raises ValueError where the framing is broken."""
  size = os.path.getsize(path)
  if size == 0:
    raise ValueError(f"empty TFRecord file: {path}")
  offsets, at = [], 0
  with open(path, "rb", buffering=0) as file:
    while at < size:
      header = os.pread(file.fileno(), _HEADER.size, at)
      if len(header) < _HEADER.size:
        raise ValueError(f"truncated record in {path} at byte {at}")
      length, crc = _HEADER.unpack(header)
      if _masked_crc(header[:8]) != crc:
        raise ValueError(f"corrupt length checksum in {path} at byte {at}")
      end = at + _HEADER.size + length + _CRC.size
      if end > size:
        raise ValueError(f"truncated record in {path} at byte {at}")
      offsets.append(at)
      at = end
  return np.asarray(offsets, np.int64)


def index_path(path: str | os.PathLike) -> str:
  """Where the offsets of a TFRecord file are kept: hidden, so that no glob takes it for data."""
  folder, name = os.path.split(os.fspath(path))
  return os.path.join(folder, f".{name}.index.npz")


def record_offsets(path: str) -> Int64[np.ndarray, "N"]:
  """Byte offsets of the records of a file, from its index file where that is up to date.

  An index that is missing, damaged, or of a file with another size or time of change is written
  anew; where its folder cannot be written the offsets stay in memory. Raises ValueError where the
  framing of the file is broken.
  """
  before = os.stat(path)
  offsets = _load_index(path, before)
  if offsets is None:
    offsets = _scan(path)
    settled = time.time() - before.st_mtime > _SETTLED_SECONDS
    folder = os.path.dirname(path) or "."
    if settled and os.stat(folder).st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
      _save_index(path, offsets, before)
  return offsets


def _stamp(status: os.stat_result) -> Int64[np.ndarray, "2"]:
  return np.asarray([status.st_size, status.st_mtime_ns], np.int64)


def _load_index(path: str, status: os.stat_result) -> Int64[np.ndarray, "N"] | None:
  try:
    with np.load(index_path(path), allow_pickle=False) as index:
      stamp, offsets = index["stamp"], index["offsets"]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
    return None
  if offsets.dtype != np.int64 or offsets.ndim != 1 or not np.array_equal(stamp, _stamp(status)):
    return None
  return offsets


def _save_index(path: str, offsets: Int64[np.ndarray, "N"], status: os.stat_result) -> None:
  target = index_path(path)
  try:
    handle, temporary = tempfile.mkstemp(
      prefix=f"{os.path.basename(target)}.", dir=os.path.dirname(target) or "."
    )
  except OSError:  # a read-only file system: the offsets stay in memory
    return
  try:
    with os.fdopen(handle, "wb") as file:
      np.savez(file, stamp=_stamp(status), offsets=offsets)
    os.chmod(temporary, status.st_mode & 0o666)
    os.replace(temporary, target)
  except OSError:  # a full disk
    os.unlink(temporary)


def expand(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
  """The files of a path or glob, or of several, each in sorted order; ValueError for none."""
  several = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
  paths: list[str] = []
  for pattern in [os.fspath(p) for p in several]:
    matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not matches:
      raise ValueError(f"no file matches {pattern!r}")
    paths += matches
  return paths


class TFRecordSource:
  """Random access to the records of TFRecord files, for `grain.MapDataset.source`.

  Args:
    patterns: a path or glob, or several; each is expanded in sorted order.

  `source[i]` gives the raw bytes of record i. Picklable, and safe to read from several threads.
  Byte offsets are read from the index beside each file, see `record_offsets`.
  Raises ValueError where no file matches, a file is empty or a record is truncated or corrupt.
  """

  def __init__(self, patterns: str | os.PathLike | Sequence[str | os.PathLike]):
    self.paths = expand(patterns)
    self._offsets = [record_offsets(path) for path in self.paths]
    self._ends: list[int] = []
    for offsets in self._offsets:
      self._ends.append(len(offsets) + (self._ends[-1] if self._ends else 0))
    self._files: dict[str, int] = {}

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def _place(self, index: int) -> tuple[str, int]:
    """(file, byte offset) of a record."""
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    number = bisect.bisect_right(self._ends, index)
    offsets = self._offsets[number]
    # a negative index: counted from the file's end
    return self.paths[number], int(offsets[index - self._ends[number]])

  def __getitem__(self, index: int) -> bytes:
    path, offset = self._place(index)
    file = self._open(path)
    length, _ = _HEADER.unpack(os.pread(file, _HEADER.size, offset))
    data = os.pread(file, length + _CRC.size, offset + _HEADER.size)
    if len(data) < length + _CRC.size:
      raise ValueError(f"corrupt record: truncated record in {path} at byte {offset}")
    data, (crc,) = data[:length], _CRC.unpack(data[length:])
    if _masked_crc(data) != crc:
      raise ValueError(f"corrupt record: corrupt data checksum in {path} at byte {offset}")
    return data

  def reader(self, index: int) -> tuple[ReadAt, int]:
    """(read, size): pieces of record `index` without the rest, and without checking its bytes."""
    path, offset = self._place(index)
    file = self._open(path)
    (size,) = _LENGTH.unpack(os.pread(file, _LENGTH.size, offset))
    start = offset + _HEADER.size
    return lambda at, count: os.pread(file, min(count, size - at), start + at), size

  def _open(self, path: str) -> int:
    file = self._files.get(path)
    if file is None:
      opened = os.open(path, os.O_RDONLY)
      file = self._files.setdefault(path, opened)
      if file != opened:  # another thread was first
        os.close(opened)
    return file

  def close(self) -> None:
    """Closes the files; a later read opens them again."""
    while self._files:
      os.close(self._files.popitem()[1])

  def __del__(self) -> None:
    if "_files" in self.__dict__:  # absent where __init__ raised
      self.close()

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_files": {}}

  def __repr__(self) -> str:
    return f"TFRecordSource({self.paths}, {len(self)} records)"
