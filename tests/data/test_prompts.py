"""Prompts of reinforcement learning: text, ground truth, batches and their stream."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vrt_jax.config import GrpoConfig, TrainConfig
from vrt_jax.data.buckets import bucket_of, pad_to_bucket
from vrt_jax.data.chat import encode_prompt
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.data.prompts import PROMPTS, make_prompt_example, prompt_batch, prompt_example
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.trace import training_example
from vrt_jax.data.transforms import object_mask
from vrt_jax.ops.resize import resize_nearest_numpy
from vrt_jax.types import PromptBatch

GOOD = 6
BUCKETS = ((256, 64), (300, 80))
RNG = np.random.default_rng(0)


def config(**data: object) -> TrainConfig:
  base = tiny.train_config(algorithm="grpo", grpo=GrpoConfig(prompt_buckets=BUCKETS))
  return dataclasses.replace(base, data=dataclasses.replace(base.data, **data))


def example(record: TrainRecord):
  return prompt_example(record, tiny.tokenizer(), config(), RNG)


def candidate(record: TrainRecord) -> dict:
  return record.annotation["generated_ver_data"]["candidates"][0]


def with_candidate(record: TrainRecord, **fields: object) -> TrainRecord:
  data = {"candidates": [candidate(record) | fields]}
  return tiny.with_annotation(record, "changed", generated_ver_data=data)


def test_the_prompt_is_that_of_training_without_its_answer():
  record = tiny.train_record(0)
  made = example(record)
  user_text, _, _ = training_example(record.annotation, think_prompt=0)
  visual = len(made.patches) // 4
  assert made.input_ids.tolist() == encode_prompt(tiny.tokenizer(), user_text, [visual])
  assert made.truth.key == "train_0"
  assert made.truth.question == candidate(record)["question"]
  assert made.truth.image_size == (192, 192)


def test_masks_of_answer_and_evidence():
  record = tiny.train_record(0)  # its reasoning names 5, 6 and 2, its answer 2
  objects = record.annotation["original_annotation"]["objects_anns"]

  def small(tag: str) -> np.ndarray:
    return resize_nearest_numpy(
      object_mask(objects[tag]["segmentation"], (192, 192), tag), (16, 16)
    )

  truth = example(record).truth
  np.testing.assert_array_equal(truth.answer_masks, small("<obj2>")[None])
  expected = np.stack([small(tag) for tag in ("<obj5>", "<obj6>", "<obj2>")])
  np.testing.assert_array_equal(truth.evidence_masks, expected)
  twice = candidate(record)["reasoning"] + " Again <obj5>."
  again = example(with_candidate(record, reasoning=twice)).truth
  np.testing.assert_array_equal(again.evidence_masks, expected)
  exact = make_prompt_example(record, tiny.tokenizer(), tiny.IMAGE, "nearest-exact").truth
  assert (exact.evidence_masks != expected).any()


def test_a_trace_without_evidence():
  truth = example(with_candidate(tiny.train_record(0), reasoning="It is plain.")).truth
  assert truth.evidence_masks.shape == (0, 16, 16)
  assert truth.answer_masks.shape == (1, 16, 16)


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({"answer_objects": []}, "no answer objects"),
    ({"answer_objects": "<obj2>"}, "no answer objects"),
    ({"answer_objects": ["<obj99>"]}, "unknown tag"),
    ({"answer_objects": [7]}, "unknown tag"),
    ({"reasoning": "See <obj99>."}, "unknown tag"),
    ({"question": "w " * 200}, "too long"),
    ({"question": "Is it <|im_end|>?"}, "control token"),
  ],
)
def test_unusable_records_say_why(fields: dict, reason: str):
  with pytest.raises(ValueError, match=f"^{reason}: "):
    example(with_candidate(tiny.train_record(0), **fields))


def test_batches_take_the_smallest_bucket_and_grow():
  examples = [example(tiny.train_record(i)) for i in range(2)]
  batch = prompt_batch(examples, tiny.tokenizer(), config())
  assert bucket_of(batch, BUCKETS) == 0
  assert [t.key for t in batch.truths] == ["train_0", "train_1"]
  large = dataclasses.replace(config(), grpo=GrpoConfig(prompt_buckets=BUCKETS[1:]))
  expected = prompt_batch(examples, tiny.tokenizer(), large)
  jax.tree.map(np.testing.assert_array_equal, pad_to_bucket(batch, BUCKETS[1]), expected)


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> str:
  records = [tiny.train_record(i) for i in range(GOOD)]
  records.append(with_candidate(records[0], answer_objects=[]))
  return tiny.write_train(tmp_path_factory.mktemp("prompts") / "train.tfrecord", records)


def stream(path: str, index: int = 0, count: int = 1, **data: object) -> BatchIterator[PromptBatch]:
  data = {"max_bad_share": 0.9, **data}
  return BatchIterator(config(**data), path, tiny.tokenizer(), PROMPTS, index, count)


def keys(batches: BatchIterator[PromptBatch], count: int) -> list[str]:
  return [t.key for batch in itertools.islice(batches, count) for t in batch.truths]


def test_the_stream_is_that_of_fine_tuning(records_file: str):
  whole = stream(records_file)
  straight = keys(whole, 10)
  assert set(straight) == {f"train_{i}" for i in range(GOOD)}
  assert whole.drops.reasons == {"no answer objects": whole.drops.reasons.total()}
  hosts = [stream(records_file, index, 2) for index in range(2)]
  shared = zip(*[keys(host, 10) for host in hosts], strict=True)
  assert [key for pair in shared for key in pair] == straight
  assert keys(stream(records_file, read_threads=3), 10) == straight


def test_the_stream_goes_on_where_it_was(records_file: str):
  first = stream(records_file)
  keys(first, 3)
  state = json.loads(json.dumps(first.state()))
  resumed = stream(records_file)
  resumed.restore(state)
  assert keys(resumed, 4) == keys(first, 4)


def test_worker_processes_give_the_same(records_file: str):
  batches = stream(records_file, num_workers=1)
  assert keys(batches, 3) == keys(stream(records_file), 3)
  batches.close()


def test_a_keys_file_names_the_prompts(records_file: str, tmp_path: Path):
  chosen = tmp_path / "keys.json"
  chosen.write_text(json.dumps({"samples": {"train_1": {"std": 0.5}, "train_4": {}}}))
  assert set(keys(stream(records_file, keys=str(chosen)), 6)) == {"train_1", "train_4"}


def test_buckets_must_ascend(records_file: str):
  wrong = dataclasses.replace(config(), grpo=GrpoConfig(prompt_buckets=BUCKETS[::-1]))
  with pytest.raises(ValueError, match=r"grpo.prompt_buckets must ascend"):
    BatchIterator(wrong, records_file, tiny.tokenizer(), PROMPTS)
