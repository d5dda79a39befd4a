"""Results of a long command, kept as they come, from which it goes on after it was killed."""

import json
import os
from pathlib import Path
from typing import Any

from vrt_jax.files import lock
from vrt_jax.runtime import barrier, is_leader


class Partial:
  """Results so far: a line with the settings, then one a batch; one that is cut off is dropped.

  Several processes make the same one; all read the file, the leader writes it.
  """

  def __init__(self, path: Path, settings: Any):
    """`settings` (JSON) decide the results. ValueError where the file belongs to other ones,
    or another process writes it."""
    self._path = path
    self.entries: list[Any] = []
    """JSON values, one a batch, in their order."""
    head = json.dumps({"settings": settings}) + "\n"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if whole and json.loads(whole[0]) != {"settings": settings}:
      raise ValueError(f"{path} belongs to other settings: delete it or choose another --out")
    self.entries = [json.loads(line) for line in whole[1:]]
    barrier("partial results are read")
    if is_leader():
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open("a")
      lock(self._file, path)
      self._file.truncate(sum(map(len, whole)))
      if not whole:
        self._file.write(head)
        self._file.flush()

  def add(self, entry: Any) -> None:
    """Keeps the result of the next batch; it is on the disk when this returns."""
    self.entries.append(entry)
    if is_leader():
      self._file.write(json.dumps(entry) + "\n")
      self._file.flush()
      os.fsync(self._file.fileno())

  def remove(self) -> None:
    """Deletes the file, when the results are elsewhere."""
    if is_leader():
      self._file.close()
      self._path.unlink()
