"""Parameters that Orbax wrote, read a layer or a block of rows at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from converters.streams import StreamedArray, block_rows


class StoredParams:
  """The arrays of an Orbax checkpoint folder by their dotted names; nothing is read beforehand."""

  def __init__(self, folder: Path, prefix: str = ""):
    """Opens every array whose name starts with `prefix`, which is cut off.

    Raises:
      ValueError: the folder is no complete Orbax checkpoint.
    """
    metadata = folder / "_METADATA"
    if not metadata.is_file():
      raise ValueError(f"{folder} is no Orbax checkpoint: it has no _METADATA")
    tree = json.loads(metadata.read_text())["tree_metadata"]
    names = [".".join(part["key"] for part in leaf["key_metadata"]) for leaf in tree.values()]
    names = [name for name in names if name.startswith(prefix)]
    opened = [(name, ts.open(_spec(folder, name), open=True)) for name in names]
    self.arrays: dict[str, StreamedArray] = {}
    for name, store in opened:
      try:
        self.arrays[name.removeprefix(prefix)] = _stream(store.result())
      except ValueError as error:
        raise ValueError(f"{folder}: {name} cannot be read ({error})") from error


def _spec(folder: Path, name: str) -> dict:
  base = {"driver": "file", "path": f"{folder.resolve()}/"}
  return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def _stream(store: ts.TensorStore) -> StreamedArray:
  """A stored array, in blocks of whole chunks where they are small enough."""
  shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
  chunks: Any = store.chunk_layout.read_chunk.shape
  chunk, limit = int(chunks[0]), block_rows(shape, dtype.itemsize)
  rows = max(1, limit // chunk * chunk) if limit >= chunk else limit
  return StreamedArray(shape, dtype, rows, lambda a, b: store[a:b].read().result())
