"""Writes parameters that are read only while they are written, through Orbax.

Orbax asks a handler for each leaf's values; ours reads a block, writes it and forgets it, so a
model of any size converts in the memory of a few blocks. The result is an ordinary Orbax
checkpoint. A chunk is never larger than a block, nor than a shard of the target mesh, so that a
host reads only what it keeps.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers
from tqdm import tqdm

from converters.rules import Shape
from converters.streams import StreamedArray

CONCURRENT_ARRAYS = 8
"""Arrays that are read and written at a time; each holds a block in memory."""


class StreamedArrayHandler(type_handlers.NumpyHandler):
  """Serialises `StreamedArray`, one block at a time, as what is read back as an array."""

  def __init__(self, bar: tqdm):
    super().__init__(deepcopy_host_arrays=False)
    self._bar = bar
    self._turns = asyncio.Semaphore(CONCURRENT_ARRAYS)
    self._context: ts.Context | None = None
    self.failure: Exception | None = None
    """The first error of reading or writing, after which nothing more is written. It is not
    raised where it happens: Orbax would stop its event loop over the other writes."""

  async def _open_and_write(self, value: StreamedArray, tspec: dict, ts_context: ts.Context) -> Any:
    tspec["metadata"]["chunks"] = list(value.chunks or (value.rows, *value.shape[1:]))
    if self._context is None:  # like `cp`, leave it to the system when to flush
      self._context = ts.Context({"file_io_sync": False}, parent=ts_context)
    async with self._turns:
      try:
        await self._write(value, tspec)
      except (ValueError, OSError) as error:
        self.failure = self.failure or error

  async def _write(self, value: StreamedArray, tspec: dict) -> None:
    store = await ts.open(ts.Spec(tspec), create=True, open=True, context=self._context)
    for start in range(0, value.shape[0], value.rows):
      if self.failure is not None:
        return
      stop = min(start + value.rows, value.shape[0])
      block = await asyncio.to_thread(value.read, start, stop)
      await store[start:stop].write(block, can_reference_source_data_indefinitely=True)
      self._bar.update(block.nbytes)


def write_params(path: Path, params: Mapping[str, StreamedArray]) -> None:
  """Writes parameters, by their dotted names, as an Orbax checkpoint at `path`.

  Raises:
    OSError: the disk is full or fails; what is at `path` is incomplete then.
  """
  total = sum(value.nbytes for value in params.values())
  with tqdm(total=total, unit="B", unit_scale=True, desc="convert") as bar:
    stream = StreamedArrayHandler(bar)
    registry = type_handlers.create_type_handler_registry((StreamedArray, stream))
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
      try:
        checkpointer.save(path, nested(params))
      except (ValueError, OSError) as error:
        stream.failure = stream.failure or error
  if stream.failure is not None:
    if "No space left" in str(stream.failure):  # tensorstore raises a ValueError
      raise OSError(f"No space left on the disk of {path.parent}") from stream.failure
    raise stream.failure
  (path / "commit_success.txt").unlink(missing_ok=True)  # names the temporary path


def nested(flat: Mapping[str, object]) -> dict:
  """{"a.b": x} -> {"a": {"b": x}}."""
  tree: dict = {}
  for name, value in flat.items():
    *path, last = name.split(".")
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = value
  return tree


def sharded(array: StreamedArray, shards: Shape) -> StreamedArray:
  """The array in chunks that no shard border cuts; `shards` counts the shards of each axis."""
  sizes = [size // count for size, count in zip(array.shape, shards, strict=True)]
  rows = max(r for r in range(1, array.rows + 1) if sizes[0] % r == 0)
  return replace(array, chunks=(rows, *sizes[1:]))
