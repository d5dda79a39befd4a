"""python -m scripts.bench_conversion: memory and speed of the converters on a full-size checkpoint.

python -m scripts.bench_conversion --tokenizer Qwen3-VL-4B-Instruct --out runs/bench_conversion

Writes a random export of the 4B model (untied, bfloat16) shard by shard, copies its files with
`cp`, converts it and converts it back, each in a process of its own, and prints a JSON line each
with seconds, GB/s, the ratio to `cp` and peak memory. Takes four times the checkpoint (10 GB) on
disk; the folder is removed at the end.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vrt_jax import cli

if TYPE_CHECKING:  # JAX is loaded after --help
  from vrt_jax.config import ModelConfig

VALUES = 1 << 24
"""Random values that all tensors are cut from, each at another offset."""


@dataclass(frozen=True)
class Args:
  """Measures the converters on a random checkpoint of full size."""

  tokenizer: Path
  """Folder with the tokenizer of Qwen3."""
  out: Path = Path("runs/bench_conversion")
  """Folder for the checkpoint and its copies; removed at the end."""
  layers: int = 36
  """Text layers; fewer for a trial."""


def random_tensors(config: "ModelConfig", values: np.ndarray) -> dict:
  """Every tensor of an export of the model, values drawn from `values` when they are written."""
  from converters.conversion import expected_sa2va
  from converters.export import patch_kernel, rename
  from converters.sa2va_rules import sa2va_table
  from converters.streams import StreamedArray, block_rows

  twice = np.concatenate([values, values])

  def stream(index: int, shape: tuple[int, ...]) -> StreamedArray:
    row = int(np.prod(shape[1:]))

    def read(start: int, stop: int) -> np.ndarray:
      offset = (index * 7919 + start * row) % len(values)
      return np.resize(twice[offset : offset + len(values)], (stop - start, *shape[1:]))

    return StreamedArray(shape, values.dtype, block_rows(shape, values.dtype.itemsize), read)

  shapes = expected_sa2va(config)[0]
  table = sa2va_table(config.text.tie_embeddings)
  names = rename(table, {n: stream(0, shape) for n, shape in shapes.items()}, patch_kernel(config))
  return {key: stream(i, array.shape) for i, (key, array) in enumerate(names.items())}


def write_checkpoint(folder: Path, tokenizer_dir: Path, layers: int) -> int:
  """Writes the export; gives its bytes."""
  from converters.hf_config import hf_config
  from converters.safetensors_writer import write_shards
  from converters.side_files import sa2va_section
  from converters.streams import Checksums
  from converters.to_hf import REMOTE_CODE
  from vrt_jax.data.chat import ChatTokenizer
  from vrt_jax.sizes import sa2va_sizes

  tokenizer = ChatTokenizer.from_dir(tokenizer_dir)
  config = sa2va_sizes("4B")
  text = replace(config.text, num_layers=layers, tie_embeddings=False)
  config = replace(config, text=text, compute_dtype="float32")
  noise = np.random.default_rng(0).standard_normal(VALUES, np.float32) * np.float32(0.02)
  tensors = random_tensors(config, noise.astype("bfloat16"))
  folder.mkdir(parents=True)
  write_shards(folder, tensors, 5 * 10**9, Checksums())
  tokenizer.save(folder)
  content = hf_config(config, tokenizer, "bfloat16", {}) | sa2va_section({}, REMOTE_CODE)
  (folder / "config.json").write_text(json.dumps(content))
  return sum(array.nbytes for array in tensors.values())


def measure(name: str, command: list[str], num_bytes: int, cp_seconds: float | None) -> float:
  """Runs a command and prints its line; gives its seconds."""
  started = time.perf_counter()
  before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  seconds = time.perf_counter() - started
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  line = {
    "name": name,
    "seconds": round(seconds, 1),
    "gb_per_second": round(num_bytes / 1e9 / seconds, 3),
    "peak_gib": round(max(peak, before) / 2**20, 2),
  }
  if cp_seconds is not None:
    line["speed_to_cp"] = round(cp_seconds / seconds, 2)
  print(json.dumps(line), flush=True)
  return seconds


def bench(args: Args) -> None:
  """Makes the checkpoint, measures, compares checksums and cleans up.

  Raises:
    ValueError: the folder exists, or the way back gave other tensors.
  """
  if args.out.exists():
    raise ValueError(f"{args.out} exists: choose another --out")
  source, model, back = args.out / "source", args.out / "model", args.out / "back"
  try:
    num_bytes = write_checkpoint(source, args.tokenizer, args.layers)
    python = [sys.executable, "-m"]
    cp_seconds = measure("cp", ["cp", "-r", str(source), str(args.out / "copy")], num_bytes, None)
    shutil.rmtree(args.out / "copy")
    into = [*python, "converters.from_hf", "--src", str(source), "--dst", str(model)]
    measure("from_hf", into, num_bytes, cp_seconds)
    out = [*python, "converters.to_hf", "--src", str(model), "--dst", str(back)]
    measure("to_hf", out, num_bytes, cp_seconds)
    sums = [json.loads((folder / "checksums.json").read_text()) for folder in (model, back)]
    if sums[0] != sums[1]:
      raise ValueError("the way back gave other tensors")
    print(json.dumps({"name": "identical_tensors", "count": len(sums[0]), "bytes": num_bytes}))
  finally:
    shutil.rmtree(args.out, ignore_errors=True)


if __name__ == "__main__":
  cli.run(
    lambda: bench(cli.parse(Args, sys.argv[1:], "python -m scripts.bench_conversion", __doc__))
  )
