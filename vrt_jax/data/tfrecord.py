"""TFRecord files without TensorFlow: an atomic writer and a random-access source.

Format (tensorflow/core/lib/io/record_writer.h): a record is a little-endian uint64 length, the
masked crc32c of those 8 bytes, the data, and the masked crc32c of the data.
"""

import bisect
import glob
import os
import struct
import tempfile
from collections.abc import Sequence
from types import TracebackType

import google_crc32c

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")


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


def _index_file(path: str) -> list[int]:
  """Byte offsets of the records of a file; raises ValueError where the framing is broken."""
  size = os.path.getsize(path)
  if size == 0:
    raise ValueError(f"empty TFRecord file: {path}")
  offsets, at = [], 0
  with open(path, "rb") as file:
    while at < size:
      file.seek(at)
      header = file.read(_HEADER.size)
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
  return offsets


class TFRecordSource:
  """Random access to the records of TFRecord files, for `grain.MapDataset.source`.

  Args:
    patterns: a path or glob, or several; each is expanded in sorted order.

  `source[i]` gives the raw bytes of record i. Picklable, and safe to read from several threads.
  Raises ValueError where no file matches, a file is empty or a record is truncated or corrupt.
  """

  def __init__(self, patterns: str | os.PathLike | Sequence[str | os.PathLike]):
    single = isinstance(patterns, str | os.PathLike)
    self.paths: list[str] = []
    for pattern in map(os.fspath, [patterns] if single else patterns):
      matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
      if not matches:
        raise ValueError(f"no file matches {pattern!r}")
      self.paths += matches
    self._offsets = [_index_file(path) for path in self.paths]
    self._ends: list[int] = []
    for offsets in self._offsets:
      self._ends.append(len(offsets) + (self._ends[-1] if self._ends else 0))
    self._files: dict[str, int] = {}

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> bytes:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    number = bisect.bisect_right(self._ends, index)
    path, offsets = self.paths[number], self._offsets[number]
    offset = offsets[index - self._ends[number]]  # a negative index: counted from the file's end
    file = self._open(path)
    length, _ = _HEADER.unpack(os.pread(file, _HEADER.size, offset))
    data = os.pread(file, length + _CRC.size, offset + _HEADER.size)
    if len(data) < length + _CRC.size:
      raise ValueError(f"truncated record in {path} at byte {offset}")
    data, (crc,) = data[:length], _CRC.unpack(data[length:])
    if _masked_crc(data) != crc:
      raise ValueError(f"corrupt data checksum in {path} at byte {offset}")
    return data

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
