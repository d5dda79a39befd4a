"""Writes safetensors shards a block at a time.

The format: eight bytes with the header's length, a JSON header (name -> dtype, shape, offsets),
the values one after the other. Source: github.com/huggingface/safetensors, README "Format".
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from converters.streams import Checksums, StreamedArray
from converters.tensor_files import INDEX, SINGLE

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8


def split_shards(
  tensors: Mapping[str, StreamedArray], max_shard_bytes: int
) -> list[dict[str, StreamedArray]]:
  """Tensors in their order as groups of at most `max_shard_bytes`, a larger one alone."""
  shards: list[dict[str, StreamedArray]] = [{}]
  size = 0
  for key, value in tensors.items():
    if shards[-1] and size + value.nbytes > max_shard_bytes:
      shards.append({})
      size = 0
    shards[-1][key] = value
    size += value.nbytes
  return shards


def write_shards(
  folder: Path, tensors: Mapping[str, StreamedArray], max_shard_bytes: int, checksums: Checksums
) -> None:
  """Writes model.safetensors, or shards of at most `max_shard_bytes` with their index."""
  shards = split_shards(tensors, max_shard_bytes)
  total = sum(value.nbytes for value in tensors.values())
  with tqdm(total=total, unit="B", unit_scale=True, desc="export") as bar:
    if len(shards) == 1:
      write_file(folder / SINGLE, shards[0], checksums, bar)
      return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
      name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
      write_file(folder / name, shard, checksums, bar)
      index |= dict.fromkeys(shard, name)
  content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
  (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def write_file(
  path: Path, tensors: Mapping[str, StreamedArray], checksums: Checksums, bar: tqdm | None = None
) -> None:
  """Writes one safetensors file."""
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for key, value in tensors.items():
    header[key] = {
      "dtype": _NAMES[value.dtype.name],
      "shape": list(value.shape),
      "data_offsets": [offset, offset + value.nbytes],
    }
    offset += value.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGNMENT)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for key, value in tensors.items():
      for block in value.blocks():
        block = np.ascontiguousarray(block)
        checksums.add(key, block)
        file.write(block.reshape(-1).view(np.uint8).data)
        if bar is not None:
          bar.update(block.nbytes)
