"""How fast training samples are made, here and as the reference makes them in PyTorch.

Both sides read the same records in the same order and give whole batches, in one thread of this
process, and then with one worker process each that hands its batches over. CPU time of all
processes is counted, so waiting costs nothing and other work on the machine hardly does. The two
sides take turns, and medians are compared. Linux only, for the times of the workers.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vrt_jax.config import DataConfig, ImageConfig, OptimConfig, TrainConfig
from vrt_jax.sizes import sa2va_sizes

MAX_PIXELS = 2048 * 28 * 28
PATCHES = MAX_PIXELS // 16**2
SYNTHETIC_RECORDS = 8


@dataclass(frozen=True)
class DataArgs:
  """Measures reading, decoding, resizing, tokenizing and padding of training samples."""

  data: str = ""
  """Records in the layout of VRT-80k: glob or prepared folder; empty for pictures of noise."""
  tokenizer: Path = Path("vrt_jax/assets/shapes_base/tokenizer")
  """Folder with tokenizer.json, for both sides."""
  batch_size: int = 2
  batches: int = 8
  """That a repetition measures."""
  repeats: int = 5


def recipe(args: DataArgs) -> TrainConfig:
  """The preprocessing of the 4B recipe."""
  image = ImageConfig(min_pixels=512 * 28 * 28, max_pixels=MAX_PIXELS, grounding_size_px=1024)
  buckets = ((2560, PATCHES), (4096, PATCHES), (8192, PATCHES))
  return TrainConfig(
    model=sa2va_sizes("4B"),
    image=image,
    data=DataConfig(buckets=buckets, num_objects=5, read_threads=0, num_workers=0),
    optim=OptimConfig(batch_size=args.batch_size),
  )


def measure_data(args: DataArgs) -> dict:
  """The line of results; ratios above 1 mean that we are faster."""
  with tempfile.TemporaryDirectory() as folder:
    data = args.data
    if not data:
      from scripts.photo_records import write_photo_records

      data = str(Path(folder) / "textures.tfrecord")
      write_photo_records(Path(data), SYNTHETIC_RECORDS)
    alone = compare(args, data, workers=0)
    worker = compare(args, data, workers=1)
  return {
    "name": "data_pipeline",
    "unit": "samples/s a core (CPU time)",
    **alone,
    **{f"worker_{name}": value for name, value in worker.items()},
    "data": args.data or f"{SYNTHETIC_RECORDS} textures",
    "repeats": args.repeats,
    "samples": args.batch_size * args.batches,
  }


def compare(args: DataArgs, data: str, workers: int) -> dict[str, float]:
  """Samples a second of both sides and their ratio, from interleaved repetitions."""
  ours, theirs = our_batches(args, data, workers), torch_batches(args, data, workers)
  seconds: dict[str, list[float]] = {"jax": [], "torch": []}
  for _ in range(args.repeats):
    seconds["jax"].append(time_batches(ours, args.batches))
    seconds["torch"].append(time_batches(theirs, args.batches))
  median = {side: statistics.median(values) for side, values in seconds.items()}
  samples = args.batches * args.batch_size
  return {
    "jax": round(samples / median["jax"], 2),
    "torch": round(samples / median["torch"], 2),
    "ratio": round(median["torch"] / median["jax"], 2),
  }


def time_batches(start: Callable[[], Iterator], count: int) -> float:
  """CPU seconds of `count` batches after the first one, which pays for the start."""
  batches = start()
  next(batches)
  begin = cpu_seconds()
  for _ in range(count):
    next(batches)
  return cpu_seconds() - begin


def cpu_seconds() -> float:
  """CPU time of this process and its workers."""
  total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
  for child in multiprocessing.active_children():
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    total += (int(fields[11]) + int(fields[12])) / tick  # utime and stime
  return total


def our_batches(args: DataArgs, data: str, workers: int) -> Callable[[], Iterator]:
  """Starts our stream."""
  from vrt_jax.data.chat import ChatTokenizer
  from vrt_jax.data.pipeline import SFT, BatchIterator

  config = recipe(args)
  threads = 1 if workers else 0
  config = replace(config, data=replace(config.data, num_workers=workers, read_threads=threads))
  tokenizer = ChatTokenizer.from_dir(args.tokenizer)

  def batches() -> Iterator:
    stream = BatchIterator(config, data, tokenizer, SFT)
    try:
      yield from stream
    finally:
      stream.close()

  return batches


def torch_batches(args: DataArgs, data: str, workers: int) -> Callable[[], Iterator]:
  """Starts the DataLoader on the same records; PyTorch gets one thread."""
  from converters import torch_loader
  from vrt_jax.data.pipeline import record_order
  from vrt_jax.data.sources import train_source

  torch_loader.use_one_thread()
  config = recipe(args)
  order = record_order(range(len(train_source(data))), config.seed)
  numbers = [int(order[i]) for i in range((args.batches + 1) * args.batch_size)]
  loader_config = torch_loader.LoaderConfig(
    data, str(args.tokenizer), config.image, args.batch_size, workers
  )
  loader = torch_loader.make_loader(loader_config, numbers)
  return lambda: iter(loader)
