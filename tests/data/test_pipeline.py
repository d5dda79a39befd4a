"""The stream of training batches: order, resume, dropped records, subsets, broken files."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vrt_jax.config import DataConfig, ImageConfig, TrainConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.pipeline import MAX_TRIES, SFT, BatchIterator, subset_numbers
from vrt_jax.data.records import TFRecordWriter, TrainRecord, serialize_eval, serialize_train
from vrt_jax.data.sources import train_source
from vrt_jax.ops.masks import encode_rle
from vrt_jax.types import Batch

GOOD = 8


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> str:
  path = tmp_path_factory.mktemp("records") / "train.tfrecord"
  return tiny.write_train(path, [tiny.train_record(i) for i in range(GOOD)])


def config(seed: int = 0, **data: object) -> TrainConfig:
  base = tiny.train_config(seed=seed)
  return dataclasses.replace(base, data=dataclasses.replace(base.data, **data))


def stream(pattern: str, seed: int = 0, **data: object) -> BatchIterator:
  return BatchIterator(config(seed, **data), pattern, tiny.tokenizer(), SFT)


def take(batches: BatchIterator, count: int) -> list[Batch]:
  return list(itertools.islice(batches, count))


def assert_equal(first: Sequence[Batch], second: Sequence[Batch]) -> None:
  assert len(first) == len(second)
  jax.tree.map(np.testing.assert_array_equal, list(first), list(second))


def pictures(batches: Sequence[Batch]) -> list[int]:
  """A number for each sample's picture, to tell samples apart."""
  return [int(image.astype(np.int64).sum()) for b in batches for image in b.grounding_image]


def test_a_seed_fixes_order_and_choices(records_file: str):
  first = take(stream(records_file), 6)
  assert_equal(first, take(stream(records_file, read_threads=4), 6))
  other = take(stream(records_file, seed=1), 6)
  assert pictures(first) != pictures(other)


def test_every_record_comes_once_an_epoch_in_a_new_order(records_file: str):
  seen = pictures(take(stream(records_file), GOOD))  # two epochs of 8 records, 2 a batch
  first, second = seen[:GOOD], seen[GOOD:]
  assert len(set(first)) == GOOD
  assert sorted(first) == sorted(second)
  assert first != second


def test_resume_gives_the_next_batches(records_file: str):
  straight = stream(records_file)
  take(straight, 5)
  state = json.loads(json.dumps(straight.state()))
  expected = take(straight, 4)
  resumed = stream(records_file)
  resumed.restore(state)
  assert resumed.drops.read == 10
  assert_equal(expected, take(resumed, 4))
  assert pictures(expected) != pictures(take(stream(records_file), 4))  # a fresh start differs


def bad_records() -> list[TrainRecord]:
  """One record for each of four reasons."""
  good = tiny.train_record(0)
  objects = good.annotation["original_annotation"]["objects_anns"]
  wrong = {"segmentation": encode_rle(np.ones((7, 7)))}
  return [
    TrainRecord("corrupt", good.image[:300], good.annotation),
    tiny.with_annotation(good, "none", generated_ver_data={"candidates": []}),
    tiny.with_annotation(good, "tag", original_annotation={"objects_anns": {"<obj99>": wrong}}),
    tiny.with_annotation(
      good, "size", original_annotation={"objects_anns": dict.fromkeys(objects, wrong)}
    ),
  ]


def test_bad_records_are_replaced_and_counted_by_reason(tmp_path: Path):
  good = [tiny.train_record(i) for i in range(4)]
  path = tiny.write_train(tmp_path / "mixed.tfrecord", good + bad_records())
  batches = stream(path, max_bad_share=0.8)
  first = pictures(take(batches, 4))  # an epoch: its 4 bad records are replaced
  assert len(set(first)) == 4
  assert len(first) == 8
  reasons = batches.drops.reasons
  assert set(reasons) == {"corrupt image", "no candidates", "unknown tag", "mask size"}
  assert min(reasons.values()) >= 1
  assert reasons.total() >= 4  # a replacement may be unusable too
  assert batches.drops.read == 8 + reasons.total()


def test_a_bad_record_shifts_no_other(tmp_path: Path):
  records = [tiny.train_record(i) for i in range(GOOD)]
  whole = tiny.write_train(tmp_path / "whole.tfrecord", records)
  records[3] = TrainRecord("corrupt", records[3].image[:300], records[3].annotation)
  broken = tiny.write_train(tmp_path / "broken.tfrecord", records)
  expected, batches = pictures(take(stream(whole), 8)), stream(broken, max_bad_share=0.5)
  got = pictures(take(batches, 8))
  other = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
  assert len(other) == 2  # the record's place in each of two epochs
  assert len({expected[i] for i in other}) == 1
  assert batches.drops.reasons == {"corrupt image": batches.drops.read - 16}


def test_too_many_bad_records_stop_the_run_with_one_line(tmp_path: Path):
  good = [tiny.train_record(i) for i in range(4)]
  path = tiny.write_train(tmp_path / "mixed.tfrecord", good + bad_records())
  with pytest.raises(ValueError, match=r"training records are unusable \(limit 5%") as error:
    take(stream(path), 40)
  assert "\n" not in str(error.value)
  assert "mask size" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_records_stop_the_run(tmp_path: Path, workers: int):
  path = tiny.write_train(tmp_path / "bad.tfrecord", bad_records())
  batches = stream(path, max_bad_share=1.0, num_workers=workers)
  with pytest.raises(ValueError, match=f"^{MAX_TRIES} of {MAX_TRIES} training records are unus"):
    next(batches)
  batches.close()


def write_keys(path: Path, content: object) -> str:
  path.write_text(json.dumps(content))
  return str(path)


@pytest.mark.parametrize("form", [list, dict.fromkeys])
def test_a_keys_file_selects_records(records_file: str, tmp_path: Path, form):
  keys = write_keys(tmp_path / "keys.json", {"samples": form(["train_2", "train_5"])})
  batches = stream(records_file, keys=keys)
  seen = pictures(take(batches, 4))
  assert len(set(seen)) == 2
  assert sorted(seen[:2]) == sorted(seen[2:4])
  assert batches.drops.state() == {"read": 8, "reasons": {}}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"samples": ["train_0", "nope", "never"]}, "2 keys of .* are in no record.*never"),
    ({"samples": []}, "names no keys"),
    ({"keys": []}, 'not of the form {"samples"'),
    (["train_0"], 'not of the form {"samples"'),
  ],
)
def test_bad_keys_files(records_file: str, tmp_path: Path, content: object, message: str):
  keys = write_keys(tmp_path / "keys.json", content)
  with pytest.raises(ValueError, match=message):
    stream(records_file, keys=keys)


def test_keys_file_missing_or_not_json(records_file: str, tmp_path: Path):
  source = train_source(records_file)
  assert list(subset_numbers("", source)) == list(range(GOOD))
  with pytest.raises(ValueError, match="does not exist"):
    subset_numbers(str(tmp_path / "none.json"), source)
  (tmp_path / "text.json").write_text("hello")
  with pytest.raises(ValueError, match="not of the form"):
    subset_numbers(str(tmp_path / "text.json"), source)


def test_broken_record_files(records_file: str, tmp_path: Path):
  data = Path(records_file).read_bytes()
  (tmp_path / "cut.tfrecord").write_bytes(data[:-10])
  with pytest.raises(ValueError, match=r"truncated record in .*cut.tfrecord at byte"):
    stream(str(tmp_path / "cut.tfrecord"))
  flipped = bytearray(data)
  flipped[500] ^= 1
  (tmp_path / "flip.tfrecord").write_bytes(flipped)
  batches = stream(str(tmp_path / "flip.tfrecord"), max_bad_share=0.5)
  take(batches, 4)
  assert set(batches.drops.reasons) == {"corrupt record"}
  with pytest.raises(ValueError, match="no file matches"):
    stream(str(tmp_path / "absent-*.tfrecord"))


def test_a_record_of_another_layout_is_counted(tmp_path: Path):
  path = tmp_path / "mixed.tfrecord"
  with TFRecordWriter(path) as writer:
    writer.write(serialize_train(tiny.train_record(0)))
    writer.write(serialize_eval(tiny.eval_record(0)))
  batches = stream(str(path), max_bad_share=0.8)
  take(batches, 2)
  assert set(batches.drops.reasons) == {"missing feature"}


def test_real_photos(shared_data: Path):
  base = config()
  real = dataclasses.replace(
    base,
    image=ImageConfig(patch_size=16, min_pixels=401408, max_pixels=1605632, grounding_size_px=1024),
    data=DataConfig(buckets=((8192, 6400),), num_objects=5, read_threads=1),
    optim=dataclasses.replace(base.optim, batch_size=1),
  )
  tokenizer = ChatTokenizer.from_dir(shared_data / "qwen3-tokenizer")
  pattern = str(shared_data / "photos" / "photos_train.tfrecord")
  batches = BatchIterator(real, pattern, tokenizer, SFT)
  batch = next(batches)
  assert batch.text.input_ids.shape == (1, 8192)
  assert batch.vision.pixel_values.shape == (1, 6400, 1536)
  assert batch.grounding_image.shape == (1, 1024, 1024, 3)
  assert batch.targets.masks.shape == (1, 5, 256, 256)
  assert not batches.drops.reasons
