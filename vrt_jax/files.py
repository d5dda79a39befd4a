"""Files that are there whole or not at all."""

import os
from pathlib import Path


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
