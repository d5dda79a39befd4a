"""Folders that are complete or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(dst: Path, num_bytes: int) -> Iterator[Path]:
  """A folder beside `dst` that takes its name at the end; after any error it is gone.

  Raises:
    ValueError: `dst` exists.
    OSError: the disk has no room for `num_bytes`.
  """
  dst = dst.absolute()
  if dst.exists():
    raise ValueError(f"{dst} exists: delete it or choose another --dst")
  dst.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(dst.parent).free
  if num_bytes > free:
    raise OSError(
      f"no space: {num_bytes / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free at {dst.parent}"
    )
  partial = dst.with_name(dst.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
  partial.mkdir()
  try:
    yield partial
    os.replace(partial, dst)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
