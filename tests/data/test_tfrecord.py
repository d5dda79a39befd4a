"""The index of TFRecord files: kept beside them, used while they stay the same."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from vrt_jax.data import tfrecord
from vrt_jax.data.tfrecord import TFRecordSource, TFRecordWriter

AN_HOUR = 3600


def write(path: Path, *records: bytes, age: float = AN_HOUR) -> str:
  """A TFRecord file that was last changed `age` seconds ago."""
  with TFRecordWriter(path) as writer:
    for record in records:
      writer.write(record)
  os.utime(path, (time.time() - age,) * 2)
  return str(path)


@pytest.fixture
def headers(monkeypatch) -> list[str]:
  """The files whose record headers were read."""
  scanned = []
  scan = tfrecord._scan

  def counted(path: str) -> np.ndarray:
    scanned.append(path)
    return scan(path)

  monkeypatch.setattr(tfrecord, "_scan", counted)
  return scanned


def content(source: TFRecordSource) -> list[bytes]:
  return [source[i] for i in range(len(source))]


def test_a_second_opening_reads_no_headers(tmp_path, headers):
  paths = [write(tmp_path / name, name.encode(), b"x" * 300) for name in ("a", "b")]
  assert content(TFRecordSource(paths)) == [b"a", b"x" * 300, b"b", b"x" * 300]
  assert headers == paths
  assert content(TFRecordSource(paths)) == [b"a", b"x" * 300, b"b", b"x" * 300]
  assert headers == paths
  assert sorted(os.listdir(tmp_path)) == [".a.index.npz", ".b.index.npz", "a", "b"]
  # a pattern that takes everything does not take the index for data
  assert TFRecordSource(str(tmp_path / "*")).paths == paths


@pytest.mark.parametrize("same", ["size", "time"])
def test_a_changed_file_is_read_again(tmp_path, headers, same):
  path = write(tmp_path / "a", b"12345", b"6")
  assert content(TFRecordSource(path)) == [b"12345", b"6"]
  if same == "size":
    write(tmp_path / "a", b"6", b"12345", age=AN_HOUR / 2)
    expected = [b"6", b"12345"]
  else:
    before = os.stat(path)
    write(tmp_path / "a", b"12", b"3")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    expected = [b"12", b"3"]
  assert content(TFRecordSource(path)) == expected
  assert content(TFRecordSource(path)) == expected
  assert headers == [path, path]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "type"])
def test_a_damaged_index_is_written_anew(tmp_path, headers, damage):
  path = write(tmp_path / "a", b"first", b"second")
  TFRecordSource(path)
  index = Path(tfrecord.index_path(path))
  good = index.read_bytes()
  offsets = np.asarray([0, 12 + len(b"first") + 4])
  at = good.index(offsets.tobytes())
  if damage == "type":
    with open(index, "wb") as file:
      np.savez(file, stamp=tfrecord._stamp(os.stat(path)), offsets=offsets.astype(np.float64))
  else:
    flipped = good[:at] + b"\x01" + good[at + 1 :]
    bad = {"empty": b"", "cut": good[:-30], "flipped": flipped, "other": b"no index"}
    index.write_bytes(bad[damage])
  for _ in range(2):
    assert content(TFRecordSource(path)) == [b"first", b"second"]
    assert headers == [path, path]
  assert index.stat().st_size == len(good)


def test_a_folder_without_write_permission_is_left_alone(tmp_path, headers):
  path = write(tmp_path / "a", b"1", b"2")
  tmp_path.chmod(0o555)
  try:
    for _ in range(2):
      assert content(TFRecordSource(path)) == [b"1", b"2"]
  finally:
    tmp_path.chmod(0o755)
  assert os.listdir(tmp_path) == ["a"] and headers == [path, path]


def test_a_full_disk_leaves_no_index(tmp_path, monkeypatch):
  path = write(tmp_path / "a", b"1", b"2")

  def full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  assert content(TFRecordSource(path)) == [b"1", b"2"]
  assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_may_still_change_gets_no_index(tmp_path):
  path = write(tmp_path / "a", b"1", age=0)
  assert content(TFRecordSource(path)) == [b"1"]
  assert os.listdir(tmp_path) == ["a"]


def test_pieces_of_a_record(tmp_path):
  source = TFRecordSource(write(tmp_path / "a", b"0123456789", b"abc"))
  read, size = source.reader(0)
  assert size == 10 and read(2, 3) == b"234" and read(8, 100) == b"89"
