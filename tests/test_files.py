"""Files appear whole or not at all, and a folder has one writer."""

import subprocess
import sys

import pytest

from vrt_jax.files import sole_writer, write_whole


def test_written_as_utf8_and_replaced(tmp_path):
  path = tmp_path / "a.json"
  for text in ("first", "größer\n"):
    write_whole(path, text)
    assert path.read_bytes() == text.encode("utf-8")
  assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  write_whole(path, "old")
  with pytest.raises(UnicodeEncodeError):
    write_whole(path, "new \ud800")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys, time
from pathlib import Path
from vrt_jax.files import sole_writer
with sole_writer(Path(sys.argv[1])):
  print("in", flush=True)
  time.sleep(600)
"""


def test_a_folder_has_one_writer_and_is_free_when_that_one_is_killed(tmp_path):
  folder = tmp_path / "run"
  other = subprocess.Popen(
    [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
  )
  assert other.stdout.readline() == "in\n"
  with pytest.raises(ValueError, match=f"another process writes to {folder}"), sole_writer(folder):
    pass
  assert folder.is_dir()
  other.kill()
  other.wait()
  with sole_writer(folder):
    (folder / "result").touch()
  assert sorted(path.name for path in folder.iterdir()) == [".lock", "result"]


def test_a_folder_without_a_result_is_deleted(tmp_path):
  with pytest.raises(KeyError), sole_writer(tmp_path / "run"):
    raise KeyError
  assert not list(tmp_path.iterdir())


def test_file_systems_without_locks_let_everybody_in(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError("not supported")

  monkeypatch.setattr("fcntl.flock", no_locks)
  with sole_writer(tmp_path), sole_writer(tmp_path):
    pass
