"""Requests to texts and masks at picture size."""

import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests import tiny
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.generate.predictor import (
  Prediction,
  Predictor,
  Request,
  binary_masks,
  prompt_bucket,
)
from vrt_jax.ops.masks import decode_rle


def torch_masks(low_res: np.ndarray, square: int, size: tuple[int, int]) -> np.ndarray:
  x = torch.tensor(low_res)[None]
  x = F.interpolate(x, (square, square), mode="bilinear", align_corners=False)
  x = F.interpolate(x, size, mode="bilinear", align_corners=False)
  return (x[0].sigmoid() > 0.5).numpy()


def test_binary_masks_equal_two_torch_interpolations():
  low_res = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
  for size in ((301, 190), (70, 411)):
    got = binary_masks(low_res, 256, size)
    expected = torch_masks(low_res, 256, size)
    assert got.shape == (3, *size)
    assert got.dtype == bool
    assert (got != expected).sum() <= 2  # logits within rounding of 0
    once = F.interpolate(torch.tensor(low_res)[None], size, mode="bilinear")[0].numpy() > 0
    assert (once != expected).sum() > 50


def test_binary_masks_of_nothing():
  assert binary_masks(np.zeros((0, 16, 16), np.float32), 64, (10, 20)).shape == (0, 10, 20)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
  """Three pictures of different sizes."""
  made = []
  for i, size in enumerate([(192, 192), (150, 90), (64, 120)]):
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(tiny.eval_record(i).image)) as picture:
      picture.resize(size).save(buffer, "PNG")
    made.append(Request(buffer.getvalue(), tiny.eval_record(i).question))
  return made


@pytest.fixture(scope="module")
def predictions(requests: list[Request]) -> tuple[list[Prediction], list[Prediction]]:
  """Of a model that can say only [SEG]: all three requests, and the last one alone."""
  seg = tiny.tokenizer().seg_id
  others = tuple(i for i in range(tiny.VOCAB_SIZE) if i != seg)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ChatTokenizer, "never_sample_ids", others)
    predictor = Predictor(tiny.loaded(), dataclasses.replace(tiny.EVAL, max_new_tokens=4))
  return list(predictor.predict(requests)), list(predictor.predict(requests[2:]))


def test_one_prediction_a_request_in_order_at_picture_size(predictions):
  found, _ = predictions
  assert [p.masks.shape[1:] for p in found] == [(192, 192), (90, 150), (120, 64)]
  for p in found:
    assert p.text == "[SEG]" * 4
    assert p.truncated
    assert len(p.masks) == len(p.mentions) == len(p.scores) == 3  # the last [SEG] has no state
    assert all(0 <= score <= 1 for score in p.scores)


def test_objects_carry_the_masks_as_rle(predictions):
  prediction = predictions[0][1]
  objects = prediction.objects()
  assert [o.index for o in objects] == [0, 1, 2]
  for o, mask in zip(objects, prediction.masks, strict=True):
    np.testing.assert_array_equal(decode_rle(o.rle), mask)
    assert prediction.text[slice(*o.text_span)] == "[SEG]"


def test_a_short_batch_and_its_filling_change_nothing(predictions):
  together, alone = predictions[0][2], predictions[1][0]
  assert together.text == alone.text
  np.testing.assert_array_equal(together.masks, alone.masks)


def test_no_requests_give_no_predictions():
  assert list(Predictor(tiny.loaded(), tiny.EVAL).predict([])) == []


def test_a_corrupt_picture_and_a_long_question_raise():
  predictor = Predictor(tiny.loaded(), tiny.EVAL)
  with pytest.raises(ValueError, match=r"^corrupt image"):
    list(predictor.predict([Request(b"text", "What?")]))
  with pytest.raises(ValueError, match="fit none of the buckets"):
    list(predictor.predict([Request(tiny.eval_record(0).image, "which one " * 200)]))


def test_prompt_bucket_is_rounded_up(requests: list[Request]):
  tokens, patches = prompt_bucket(tiny.loaded(), requests[0], thinking=True)
  assert (tokens, patches) == (128, 64)
  assert prompt_bucket(tiny.loaded(), requests[0], thinking=False)[0] == 64
