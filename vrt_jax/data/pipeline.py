"""Grain: records -> shuffled, endless, checkpointable stream of training batches for many hosts.

    place p of the stream -> record number (a new order each epoch) -> Slot
    batch k of B places, kB .. (k + 1)B - 1; host h of H holds rows hB/H .. (h + 1)B/H - 1 of it

Order and random choices belong to places, so they depend on the seed alone: neither on the number
of hosts nor on workers or threads. A host touches the records of its own rows only. Threads make
samples ahead; worker processes take turns at whole batches.
"""

import collections
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import grain
import numpy as np
from absl import flags

from vrt_jax.config import TrainConfig
from vrt_jax.data.buckets import check_buckets
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.drops import DropCounter, DropState, too_many_unusable
from vrt_jax.data.host_rows import HostRows, Share
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.sources import Source, train_source
from vrt_jax.data.transforms import Example, collate, make_example
from vrt_jax.types import Batch

P = TypeVar("P")
B = TypeVar("B")

MAX_TRIES = 32
"""Records that a place of the stream tries before the run stops."""


@dataclass(frozen=True)
class Task(Generic[P, B]):
  """What a kind of training makes of records; all else of the stream is the same for all kinds.

  Both functions are of a module, since worker processes get them by name.
  """

  make: Callable[[TrainRecord, ChatTokenizer, TrainConfig, np.random.Generator], P]
  """A record -> an example; ValueError("reason: detail") where it cannot be used."""
  collate: Callable[[list[P], ChatTokenizer, TrainConfig], B]
  """Examples -> a batch of the smallest bucket that holds them."""
  buckets: str
  """Field of TrainConfig that has the buckets."""


def sft_example(
  record: TrainRecord, tokenizer: ChatTokenizer, config: TrainConfig, rng: np.random.Generator
) -> Example:
  """`make_example` with the recipe's settings."""
  return make_example(record, tokenizer, config.data, config.image, rng)


def sft_batch(examples: list[Example], tokenizer: ChatTokenizer, config: TrainConfig) -> Batch:
  """`collate` with the recipe's settings."""
  return collate(examples, tokenizer, config.model, config.image, config.data.buckets)


SFT: Task[Example, Batch] = Task(sft_example, sft_batch, "data.buckets")


@dataclass(frozen=True)
class Slot(Generic[P]):
  """A place of the stream: its example and why records that were tried before it are unusable."""

  example: P
  dropped: tuple[str, ...]


@dataclass(frozen=True)
class ToSlot(grain.transforms.RandomMap):
  """Record number -> Slot.

  An unusable record is replaced by others, drawn by the place's own generator: the places after it
  stay where they are. The reason is what stands before the colon of the error.

  Raises:
    ValueError: MAX_TRIES records in a row are unusable.
  """

  source: Source[TrainRecord]
  numbers: Sequence[int]
  """Of the records that may be drawn."""
  tokenizer: ChatTokenizer
  config: TrainConfig
  task: Task

  def random_map(self, element: int, rng: np.random.Generator) -> Slot:
    dropped: list[str] = []
    while len(dropped) < MAX_TRIES:
      try:
        record = self.source[int(element)]
        example = self.task.make(record, self.tokenizer, self.config, rng)
        return Slot(example, tuple(dropped))
      except ValueError as error:
        dropped.append(str(error).partition(":")[0])
      element = self.numbers[int(rng.integers(len(self.numbers)))]
    reasons = collections.Counter(dropped)
    raise ValueError(too_many_unusable(reasons, MAX_TRIES, self.config.data.max_bad_share))


@dataclass(frozen=True)
class ToBatch(grain.transforms.Map):
  """Slots of a batch -> (batch, reasons of its dropped records)."""

  tokenizer: ChatTokenizer
  config: TrainConfig
  task: Task

  def map(self, element: Sequence[Slot]) -> tuple[object, tuple[str, ...]]:
    batch = self.task.collate([slot.example for slot in element], self.tokenizer, self.config)
    return batch, tuple(reason for slot in element for reason in slot.dropped)


class StreamState(TypedDict):
  """Position in the stream, for a checkpoint: the same for any number of hosts and workers."""

  batch: int
  """Batches that were taken."""
  drops: DropState
  """Of the host that wrote it."""


class BatchIterator(Iterator[B]):
  """Endless training batches whose position can be saved and restored.

  Args:
    config: with the resolved model and image settings.
    data: glob of TFRecord files, or the folder of a prepared data set.
    tokenizer: of the model.
    task: what records become, e.g. `SFT`.
    process_index: this host's number.
    process_count: hosts that share every batch; each gives its contiguous rows of it, and all rows
      in the order of hosts are the batch that one host alone would give. A host pads its rows to
      the smallest bucket that holds them, see `vrt_jax.data.buckets`.

  Raises ValueError where hosts do not divide the batch size, buckets do not ascend, no record is
  there, or the keys file is wrong.
  """

  def __init__(
    self,
    config: TrainConfig,
    data: str,
    tokenizer: ChatTokenizer,
    task: Task[Any, B],
    process_index: int = 0,
    process_count: int = 1,
  ):
    if not 0 <= process_index < process_count:
      raise ValueError(f"process {process_index} is not one of {process_count}")
    if config.optim.batch_size % process_count:
      raise ValueError(
        f"optim.batch_size {config.optim.batch_size} does not divide over {process_count} processes"
      )
    self.buckets = attrgetter(task.buckets)(config)
    check_buckets(self.buckets, task.buckets)
    source = train_source(data)
    if len(source) == 0:
      raise ValueError(f"no training records in {data}")
    self._config, self._tokenizer, self._source, self._task = config, tokenizer, source, task
    self._numbers = subset_numbers(config.data.keys, source)
    self._share = Share(
      config.optim.batch_size, process_index, process_count, max(1, config.data.num_workers), 0
    )
    self.drops = DropCounter(config.data.max_bad_share)
    self._start(0)

  def _start(self, batch: int) -> None:
    """Begins to read at a batch."""
    self._batch = batch
    self._iterator = iter(self._dataset(replace(self._share, first=batch)))

  def _dataset(self, share: Share) -> grain.IterDataset:
    """This host's rows of the batches from `share.first` on."""
    config, data = self._config, self._config.data
    read = grain.ReadOptions(
      num_threads=data.read_threads,
      prefetch_buffer_size=data.read_threads + share.rows if data.read_threads else 0,
    )
    dataset = (
      record_order(self._numbers, config.seed)
      .random_map(ToSlot(self._source, self._numbers, self._tokenizer, config, self._task))
      .pipe(HostRows, share)
      .to_iter_dataset(read)
      .batch(share.rows, drop_remainder=True, batch_fn=tuple)
      .map(ToBatch(self._tokenizer, config, self._task))
    )
    if data.num_workers:
      if not flags.FLAGS.is_parsed():  # Grain reads its flags before it starts a worker
        flags.FLAGS.mark_as_parsed()
      return dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=data.num_workers, per_worker_buffer_size=1)
      )
    return grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=1 if data.read_threads else 0
    )

  def __next__(self) -> B:
    batch, dropped = next(self._iterator)
    self._batch += 1
    self.drops.count(self._share.rows, dropped)
    return batch

  def state(self) -> StreamState:
    """JSON-ready: batches that were taken and what this host dropped on the way to them."""
    return {"batch": self._batch, "drops": self.drops.state()}

  def restore(self, state: StreamState) -> None:
    """Continues from `state()`: the next batch is the one that would have come next.

    The state may come from another number of hosts or workers.
    """
    self.close()
    self.drops.restore(state["drops"])
    self._start(state["batch"])

  def close(self) -> None:
    """Ends threads and worker processes."""
    self._iterator.close()


def record_order(numbers: Sequence[int], seed: int) -> grain.MapDataset:
  """Record number at every place of the endless stream: each epoch all of them, in a new order."""
  return grain.MapDataset.source(numbers).seed(seed).shuffle().repeat()


def subset_numbers(path: str, source: Source[TrainRecord]) -> Sequence[int]:
  """Numbers of the records of a subset file {"samples": [keys] or {key: ..}}; all without a file.

  Raises:
    ValueError: the file has another form, names no keys, or names keys that no record has.
  """
  if not path:
    return range(len(source))
  if not Path(path).is_file():
    raise ValueError(f"keys file {path} does not exist")
  try:
    keys = frozenset(json.loads(Path(path).read_text())["samples"])
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(f'keys file {path} is not of the form {{"samples": [..]}}') from error
  if not keys:
    raise ValueError(f"keys file {path} names no keys")
  known = source.keys()
  if missing := sorted(keys - set(known)):
    raise ValueError(f"{len(missing)} keys of {path} are in no record, the first is {missing[0]}")
  return [number for number, key in enumerate(known) if key in keys]
