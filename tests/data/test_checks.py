"""Checks of records: what training would stumble over, with the same reasons."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests import tiny
from tests.pictures import encoded, picture
from vrt_jax.data.checks import check_eval_record, check_train_record, picture_size
from vrt_jax.data.records import EvalRecord, TrainRecord, read_eval_records, read_train_records
from vrt_jax.data.transforms import make_example
from vrt_jax.ops.masks import encode_rle


def with_picture(image: bytes) -> TrainRecord:
  return dataclasses.replace(tiny.train_record(0), image=image)


def with_object(change: object) -> TrainRecord:
  """A record of which the last mentioned object is annotated as `change`."""
  record = tiny.train_record(0)
  objects = record.annotation["original_annotation"]["objects_anns"]
  changed = {"objects_anns": objects | {list(objects)[-1]: change}}
  return tiny.with_annotation(record, "bad", original_annotation=changed)


def with_candidate(**fields: object) -> TrainRecord:
  record = tiny.train_record(0)
  candidate = record.annotation["generated_ver_data"]["candidates"][0] | fields
  return tiny.with_annotation(record, "bad", generated_ver_data={"candidates": [candidate]})


SIZE = list(picture_size(tiny.train_record(0).image))
BAD = {
  "no candidates": lambda: tiny.with_annotation(tiny.train_record(0), "k", generated_ver_data={}),
  "missing text": lambda: with_candidate(reasoning=None),
  "seg in text": lambda: with_candidate(answer_caption="It is [SEG]."),
  "no mask mention": lambda: with_candidate(answer_caption="this", reasoning="that"),
  "unknown tag": lambda: with_candidate(answer_caption="It is <obj987>."),
  "no objects": lambda: tiny.with_annotation(tiny.train_record(0), "k", original_annotation={}),
  "corrupt image": lambda: with_picture(b"no jpeg"),
  "aspect ratio": lambda: with_picture(encoded(picture(402, 2))),
  "mask size": lambda: with_object({"segmentation": encode_rle(np.ones((3, 3)))}),
  "bad mask": lambda: with_object({"caption": "no mask"}),
  "RLE": lambda: with_object({"segmentation": {"size": SIZE, "counts": [5]}}),
}


@pytest.mark.parametrize("reason", BAD)
def test_unusable_records_have_the_reason_of_training(reason: str):
  record = BAD[reason]()
  with pytest.raises(ValueError, match=f"^{reason}: "):
    check_train_record(record)
  config = dataclasses.replace(tiny.train_config().data, num_objects=99)
  with pytest.raises(ValueError, match=f"^{reason}: "):
    make_example(record, tiny.tokenizer(), config, tiny.IMAGE, np.random.default_rng(0))


def test_a_cut_picture_is_found_by_decoding_only():
  record = with_picture(tiny.train_record(0).image[:-200])
  assert check_train_record(record, "header").height > 0
  with pytest.raises(ValueError, match=r"^corrupt image: "):
    check_train_record(record, "full")
  with pytest.raises(ValueError, match='must be "header" or "full"'):
    picture_size(record.image, "half")


def test_facts():
  record = with_candidate(reasoning="An <obj1>, a <obj1>.", answer_caption="<obj2>", question="?")
  facts = check_train_record(record)
  assert (facts.objects, facts.mentions) == (2, 3)
  assert picture_size(encoded(picture(40, 30))) == (30, 40)
  assert facts.characters > len("?An <obj1>, a <obj1>.<obj2>")


def test_orientation_is_ignored():
  tags = picture(40, 30).getexif()
  tags[274] = 6  # a quarter turn
  turned = encoded(picture(40, 30), "JPEG", exif=tags)
  assert picture_size(turned, "header") == picture_size(turned, "full") == (30, 40)


EVAL_BAD: dict[str, Callable[[EvalRecord], dict]] = {
  "missing text": lambda record: {"question": " "},
  "no mask mention": lambda record: {"reasoning_ids": [], "answer_ids": []},
  "corrupt image": lambda record: {"image": b"GIF89a"},
  "unknown tag": lambda record: {"answer_ids": ["987"]},
  "mask size": lambda record: {"image": encoded(picture(50, 60))},
  "RLE": lambda record: {"objects": {name: {"mask": {}} for name in record.objects}},
}


@pytest.mark.parametrize("reason", EVAL_BAD)
def test_unusable_evaluation_records(reason: str):
  record = tiny.eval_record(0)
  facts = check_eval_record(record, "full")
  assert facts.mentions == len(record.reasoning_ids) + len(record.answer_ids) > 0
  with pytest.raises(ValueError, match=f"^{reason}: "):
    check_eval_record(dataclasses.replace(record, **EVAL_BAD[reason](record)))


def test_the_photographs_are_usable(shared_data):
  photos = shared_data / "photos"
  train = [
    check_train_record(r, "full") for r in read_train_records(str(photos / "*train.tfrecord"))
  ]
  evaluation = [
    check_eval_record(r, "full") for r in read_eval_records(str(photos / "*eval.tfrecord"))
  ]
  assert len(train) == len(evaluation) == 7
  assert [(f.height, f.width) for f in train] == [(f.height, f.width) for f in evaluation]
