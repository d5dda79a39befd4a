"""Many hosts and workers: one order, disjoint shares, exact resume."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vrt_jax.data import tfds_builders
from vrt_jax.data.buckets import pad_to_bucket
from vrt_jax.data.pipeline import SFT, BatchIterator, record_order
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.sources import Source
from vrt_jax.types import Batch

NUM_RECORDS = 11
"""Neither a multiple of the batch nor of any number of hosts, so that epochs end within batches."""
BATCH_SIZE = 4
BAD = (2, 7)


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Two of the records are unusable."""
  records = [tiny.train_record(i) for i in range(NUM_RECORDS)]
  for i in BAD:
    records[i] = TrainRecord(f"bad_{i}", records[i].image[:300], records[i].annotation)
  return tiny.write_train(tmp_path_factory.mktemp("records") / "train.tfrecord", records)


def stream(path: str, index: int = 0, count: int = 1, **data: object) -> BatchIterator:
  base = tiny.train_config()
  config = dataclasses.replace(
    base,
    data=dataclasses.replace(base.data, max_bad_share=0.6, **data),
    optim=dataclasses.replace(base.optim, batch_size=BATCH_SIZE),
  )
  return BatchIterator(config, path, tiny.tokenizer(), SFT, index, count)


def take(batches: BatchIterator, count: int) -> list[Batch]:
  return list(itertools.islice(batches, count))


def together(parts: Sequence[Batch]) -> Batch:
  """The rows of all hosts, one after the other."""
  joined = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
  positions = np.concatenate([p.text.position_ids for p in parts], axis=1)
  return joined.replace(text=joined.text.replace(position_ids=positions))


def assert_equal(first: Sequence[Batch], second: Sequence[Batch]) -> None:
  assert len(first) == len(second)
  jax.tree.map(np.testing.assert_array_equal, list(first), list(second))


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_together_give_the_batches_of_one(records_file: str, count: int):
  whole = stream(records_file)
  expected = take(whole, 7)
  hosts = [stream(records_file, index, count) for index in range(count)]
  parts = [take(host, 7) for host in hosts]
  assert all(b.text.input_ids.shape[0] == BATCH_SIZE // count for part in parts for b in part)
  assert_equal([together(step) for step in zip(*parts, strict=True)], expected)
  assert sum(host.drops.read for host in hosts) == whole.drops.read
  assert sum((host.drops.reasons for host in hosts), Counter()) == whole.drops.reasons
  swapped = [together(step) for step in zip(*reversed(parts), strict=True)]
  with pytest.raises(AssertionError):
    assert_equal(swapped, expected)


def test_a_host_reads_its_own_records_only(
  records_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  path = shutil.copy(records_file, tmp_path)
  read: list[int] = []
  original = Source.__getitem__

  def recorded(self: Source, index: int) -> TrainRecord:
    if path in self.raw.paths:  # not a stream of another test that reads ahead
      read.append(index)
    return original(self, index)

  monkeypatch.setattr(Source, "__getitem__", recorded)
  shares = []
  for index in range(2):
    batches = stream(path, index, 2, read_threads=0)
    take(batches, 2)  # 8 of 11 places: within the first epoch
    assert len(read) == batches.drops.read  # nothing is read that is not used
    shares.append([i for i in read if i not in BAD])
    read.clear()
  first, second = map(set, shares)
  replaced = sum(map(len, shares)) - len(first | second)
  assert replaced <= len(BAD)  # only the stand-ins of bad records may come twice
  assert len(first) >= 2
  assert len(second) >= 2


@pytest.mark.parametrize("data", [{"num_workers": 1}, {"num_workers": 2, "read_threads": 2}])
def test_workers_and_threads_change_nothing(records_file: str, data: dict):
  expected = stream(records_file)
  batches = stream(records_file, **data)
  assert_equal(take(batches, 6), take(expected, 6))
  assert batches.state() == expected.state()
  batches.close()


@pytest.mark.parametrize("size", [11, 1000])
def test_every_epoch_covers_all_records_in_another_order(size: int):
  order = record_order(range(size), seed=3)
  epochs = np.asarray([order[i] for i in range(4 * size)]).reshape(4, size)
  assert (np.sort(epochs, axis=1) == np.arange(size)).all()
  for first, second in itertools.combinations([np.arange(size), *epochs], 2):
    assert (first == second).mean() < 0.5
    assert not any((np.roll(first, shift) == second).all() for shift in range(size))
  if size == 1000:  # neighbours of one epoch are no neighbours in the next
    places = np.argsort(epochs, axis=1)
    distance = np.abs(np.diff(places[1][epochs[0]]))
    assert 250 < distance.mean() < 420  # 333 for independent orders
    assert np.abs(np.corrcoef(places) - np.eye(4)).max() < 0.15


@pytest.mark.parametrize("position", [0, 1, 3, 5])
@pytest.mark.parametrize(
  "data", [{"read_threads": 0}, {"read_threads": 3}, {"num_workers": 1}], ids=str
)
def test_resume_at_any_position(records_file: str, position: int, data: dict):
  straight = stream(records_file, read_threads=0)
  take(straight, position)
  state = json.loads(json.dumps(straight.state()))
  expected = take(straight, 3)
  resumed = stream(records_file, **data)
  take(resumed, 1)  # threads have read ahead
  resumed.restore(state)
  assert resumed.state() == state
  assert_equal(take(resumed, 3), expected)
  assert resumed.state() == straight.state()
  other = stream(records_file)
  other.restore(state | {"batch": state["batch"] + 1})
  with pytest.raises(AssertionError):
    assert_equal(take(other, 3), expected)
  resumed.close()


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_hosts_goes_on_at_the_same_place(records_file: str, counts: tuple):
  before, after = counts
  straight = stream(records_file)
  take(straight, 3)
  expected = take(straight, 3)
  writer = stream(records_file, 0, before)
  take(writer, 3)
  state = writer.state()
  parts = []
  for index in range(after):
    host = stream(records_file, index, after)
    host.restore(state)
    parts.append(take(host, 3))
  assert_equal([together(step) for step in zip(*parts, strict=True)], expected)


def test_a_subset_is_the_same_for_any_number_of_hosts(records_file: str, tmp_path: Path):
  keys = tmp_path / "keys.json"
  keys.write_text(json.dumps({"samples": ["train_1", "train_5", "train_8"]}))
  expected = take(stream(records_file, keys=str(keys)), 3)
  hosts = [stream(records_file, index, 2, keys=str(keys)) for index in range(2)]
  parts = [take(host, 3) for host in hosts]
  assert_equal([together(step) for step in zip(*parts, strict=True)], expected)
  assert not any(host.drops.reasons for host in hosts)  # bad records outside it are not touched


def test_hosts_agree_on_a_bucket(records_file: str):
  """Each host pads to its own bucket; grown to the largest they are the whole batch."""
  buckets = ((208, 64), (228, 64), (384, 64), (384, 80))
  expected = take(stream(records_file, buckets=buckets), 6)
  parts = [take(stream(records_file, i, 4, buckets=buckets), 6) for i in range(4)]
  mixed = 0
  for whole, *rows in zip(expected, *parts, strict=True):
    sizes = [(p.text.input_ids.shape[1], p.vision.pixel_values.shape[1]) for p in rows]
    mixed += len(set(sizes)) > 1
    assert_equal([together([pad_to_bucket(p, max(sizes)) for p in rows])], [whole])
  assert mixed


def test_a_prepared_folder_gives_the_same_batches(tmp_path: Path):
  records = [tiny.train_record(i) for i in range(NUM_RECORDS)]
  path = tiny.write_train(tmp_path / "train.tfrecord", records)
  tfds_builders.build(tfds_builders.Vrt80k, path, tmp_path / "prepared")
  expected = take(stream(path), 3)
  for workers in (0, 1):
    batches = stream(str(tmp_path / "prepared"), num_workers=workers)
    assert_equal(take(batches, 3), expected)
    batches.close()


@pytest.mark.parametrize(
  ("index", "count", "message"),
  [(0, 3, "optim.batch_size 4 does not divide over 3"), (2, 2, "process 2 is not one of 2")],
)
def test_impossible_shares(records_file: str, index: int, count: int, message: str):
  with pytest.raises(ValueError, match=message):
    stream(records_file, index, count)
