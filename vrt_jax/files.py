"""Files that are there whole or not at all, and folders that one process writes to."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def write_whole(path: Path, text: str) -> None:
  """Writes UTF-8 text and makes it durable; after an error the old file, or none, is still there.

  Raises:
    OSError: the folder is missing, the disk is full, ..
  """
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with partial.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def lock(file: IO, path: Path) -> None:
  """Locks an open file against other processes of this machine until it is closed.

  File systems without locks let everybody in.

  Raises:
    ValueError: another process holds it; `path` is what it writes.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    message = f"another process writes to {path}: wait for its end or choose another folder"
    raise ValueError(message) from None
  except OSError:
    pass


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
  """Makes a folder and locks it as `lock` does, by a file `.lock` in it.

  A folder into which nothing was written is deleted at the end.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("w") as file:
    lock(file, folder)
    try:
      yield
    finally:
      if folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:
        shutil.rmtree(folder)
