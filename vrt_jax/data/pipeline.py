"""Grain: record files -> shuffled, endless, checkpointable stream of training batches."""

import collections
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from vrt_jax.config import TrainConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.records import TFRecordSource, parse_train
from vrt_jax.data.transforms import Example, collate, make_example
from vrt_jax.types import Batch


@dataclass(frozen=True)
class Dropped:
  """Stands for a record that could not be used, and the reason."""

  reason: str


@dataclass(frozen=True)
class ToExample(grain.transforms.RandomMap):
  """Record bytes -> Example, or Dropped with the reason before the colon of the error."""

  tokenizer: ChatTokenizer
  config: TrainConfig
  keys: frozenset[str] | None = None

  def random_map(self, element: bytes, rng: np.random.Generator) -> Example | Dropped | None:
    try:
      record = parse_train(element)
      if self.keys is not None and record.key not in self.keys:
        return None
      return make_example(record, self.tokenizer, self.config.data, self.config.image, rng)
    except ValueError as error:
      return Dropped(str(error).partition(":")[0])


class DropCounter:
  """Grain filter that passes examples and counts dropped records by reason.

  Raises:
    ValueError: more than `max_bad_share` of at least `MIN_READ` records were dropped.
  """

  MIN_READ = 20

  def __init__(self, max_bad_share: float):
    self.max_bad_share = max_bad_share
    self.read = 0
    self.reasons: collections.Counter[str] = collections.Counter()

  def __call__(self, element: Example | Dropped) -> bool:
    self.read += 1
    if not isinstance(element, Dropped):
      return True
    self.reasons[element.reason] += 1
    dropped = self.reasons.total()
    if self.read >= self.MIN_READ and dropped > self.max_bad_share * self.read:
      raise ValueError(
        f"{dropped} of {self.read} training records are unusable (limit "
        f"{self.max_bad_share:.0%}, data.max_bad_share): {dict(self.reasons)}"
      )
    return False

  def state(self) -> dict:
    """What a checkpoint keeps."""
    return {"read": self.read, "reasons": dict(self.reasons)}

  def restore(self, state: dict) -> None:
    """Continues counting from a checkpoint."""
    self.read = state["read"]
    self.reasons = collections.Counter(state["reasons"])


class BatchIterator(Iterator[Batch]):
  """Endless training batches whose position can be saved and restored.

  The order of records and every random choice depend on the seed alone.
  """

  def __init__(self, config: TrainConfig, pattern: str, tokenizer: ChatTokenizer):
    source = TFRecordSource(pattern)
    self.drops = DropCounter(config.data.max_bad_share)
    keys = load_keys(config.data.keys, source) if config.data.keys else None
    if keys is None and len(source) == 0:
      raise ValueError(f"no training records in {pattern}")
    dataset = (
      grain.MapDataset.source(source)
      .seed(config.seed)
      .shuffle()
      .repeat()
      .random_map(ToExample(tokenizer, config, keys))
      .to_iter_dataset(
        grain.ReadOptions(
          num_threads=config.data.read_threads, prefetch_buffer_size=2 * config.optim.batch_size
        )
      )
      .filter(self.drops)
      .batch(
        config.optim.batch_size,
        drop_remainder=True,
        batch_fn=lambda examples: collate(
          examples, tokenizer, config.model, config.image, config.data.buckets
        ),
      )
    )
    self._iterator = iter(dataset)

  def __next__(self) -> Batch:
    return next(self._iterator)

  def state(self) -> dict:
    """JSON-ready position in the stream and drop counts."""
    return {"iterator": self._iterator.get_state(), "drops": self.drops.state()}

  def restore(self, state: dict) -> None:
    """Continues from `state()`: the next batch is the one that would have come next."""
    self._iterator.set_state(state["iterator"])
    self.drops.restore(state["drops"])


def load_keys(path: str, source: TFRecordSource) -> frozenset[str]:
  """Keys of a subset file {"samples": [keys] or {key: ..}}.

  Raises:
    ValueError: the file has another form, names no keys, or names keys that no record has.
  """
  if not Path(path).is_file():
    raise ValueError(f"keys file {path} does not exist")
  try:
    keys = frozenset(json.loads(Path(path).read_text())["samples"])
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(f'keys file {path} is not of the form {{"samples": [..]}}') from error
  if not keys:
    raise ValueError(f"keys file {path} names no keys")
  known = {parse_train(source[i]).key for i in range(len(source))}
  if missing := sorted(keys - known):
    raise ValueError(f"{len(missing)} keys of {path} are in no record, the first is {missing[0]}")
  return keys
