"""Files of a checkpoint, read and checked without Orbax, whose barriers wait for all processes."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts

READS = 32
"""Chunks that are read at a time when a checkpoint is checked."""


def read_item(folder: Path) -> Any:
  """A JSON item of a checkpoint."""
  return json.loads((folder / "metadata").read_text())


def check_arrays(folder: Path) -> None:
  """Reads every stored chunk once, divided over the processes.

  Orbax tells a chunk that is missing or cut off from other errors by its text alone.

  Raises:
    ValueError: a chunk, or the table of them, cannot be read.
  """
  spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
  store = ts.KvStore.open(spec).result()
  keys = sorted(store.list().result())
  if not keys:
    raise ValueError(f"{folder} holds no arrays")
  own = keys[jax.process_index() :: jax.process_count()]
  for start in range(0, len(own), READS):
    for key, read in [(key, store.read(key)) for key in own[start : start + READS]]:
      if not read.result().value:  # a file of values that is gone reads as empty
        raise ValueError(f"{folder}: the values of {key.decode()} are gone")


def first_line(error: BaseException) -> str:
  """The first line of an error's text, or its kind where it has none."""
  return (str(error).splitlines() or [""])[0].strip() or type(error).__name__


def free_name(path: Path) -> Path:
  """`path`, or it with the first number that is not taken."""
  numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
  return next(p for p in itertools.chain([path], numbered) if not p.exists())
