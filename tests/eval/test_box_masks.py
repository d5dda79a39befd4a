"""Boxes to masks: filled, and by SAM 2 with one encoding a picture."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eval import box_masks
from eval.box_masks import BoxSegmenter, filled_masks
from tests import tiny
from vrt_jax import model_directory
from vrt_jax.models.sam2.model import MaskOutput, Sam2
from vrt_jax.ops.masks import iou_matrix

BOXES = [(0.1, 0.2, 0.6, 0.9), (0.0, 0.0, 1.0, 1.0), (0.5, 0.25, 0.75, 0.375)]


def test_examples_of_the_docstrings():
  result = doctest.testmod(box_masks)
  assert result.attempted == 2 and result.failed == 0


@pytest.mark.parametrize(
  ("box", "rows", "columns"),
  [
    ((0.1, 0.25, 0.5, 1.0), (10, 40), (6, 30)),
    ((0.0, 0.0, 1.0, 1.0), (0, 40), (0, 60)),
    ((0.501, 0.0, 0.502, 0.01), (0, 1), (30, 31)),
    ((0.9999, 0.999, 1.0, 1.0), (39, 40), (59, 60)),
  ],
)
def test_filled_boxes(box, rows, columns):
  (mask,) = filled_masks([box], (40, 60))
  expected = np.zeros((40, 60), bool)
  expected[slice(*rows), slice(*columns)] = True
  np.testing.assert_array_equal(mask, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("sam2") / "model"
  loaded = tiny.loaded()
  model_directory.save(path, loaded.model, loaded.tokenizer, loaded.image)
  return str(path)


class Calls:
  """Stands for SAM 2: its mask of a box is the box."""

  def __init__(self, monkeypatch):
    self.encoded, self.decoded = [], []
    monkeypatch.setattr(Sam2, "encode_image", lambda model, image: self.encode(image))
    monkeypatch.setattr(Sam2, "decode_boxes", lambda model, image, boxes: self.decode(image, boxes))

  def encode(self, image: jax.Array) -> jax.Array:
    self.encoded.append((image.shape, image.dtype))
    return image

  def decode(self, image: jax.Array, boxes: jax.Array) -> MaskOutput:
    self.decoded.append(boxes.shape)
    centres = 4 * jnp.arange(image.shape[1] // 4) + 2.0
    x, y = centres, centres[:, None]
    x0, y0, x1, y1 = jnp.moveaxis(boxes[..., None, None], 2, 0)
    inside = (x0 < x) & (x < x1) & (y0 < y) & (y < y1)
    return MaskOutput(10.0 * inside - 5.0, boxes[..., 2] / 100, boxes[..., 0])


def test_sam2_is_asked_in_pixels_of_its_input(folder, monkeypatch):
  calls = Calls(monkeypatch)
  picture = Image.new("RGB", (200, 120))
  masks, scores = BoxSegmenter(folder).masks(picture, BOXES)
  assert masks.dtype == bool and masks.shape == (3, 120, 200)
  assert all(
    iou > 0.85 for iou in np.diag(iou_matrix(list(masks), list(filled_masks(BOXES, (120, 200)))))
  )
  assert scores == pytest.approx([0.64 * 0.6, 0.64, 0.64 * 0.75])
  assert calls.encoded == [((1, 64, 64, 3), np.uint8)] and calls.decoded == [(1, 4, 4)]


def test_one_encoding_a_picture_and_few_programs(folder, monkeypatch):
  """What is traced once is compiled once."""
  calls = Calls(monkeypatch)
  monkeypatch.setattr(box_masks, "BATCH_SIZES", (2, 4))
  segmenter = BoxSegmenter(folder)
  encode = segmenter._encode
  runs = []
  segmenter._encode = lambda *args: runs.append(1) or encode(*args)
  for width, count in ((30, 1), (40, 2), (50, 3), (60, 9), (70, 4)):
    boxes = [(0.0, 0.0, (i + 1) / 10, 1.0) for i in range(count)]
    masks, scores = segmenter.masks(Image.new("RGB", (width, 20)), boxes)
    assert masks.shape == (count, 20, width)
    assert scores == pytest.approx([0.64 * (i + 1) / 10 for i in range(count)])
    assert np.all(np.diff(masks.sum((1, 2))) > 0)
  assert len(runs) == 5
  assert len(calls.encoded) == 1 and calls.decoded == [(1, 2, 4), (1, 4, 4)]


def test_a_picture_without_boxes(folder):
  masks, scores = BoxSegmenter(folder).masks(Image.new("RGB", (30, 20)), [])
  assert masks.shape == (0, 20, 30) and scores == []


def test_no_model(tmp_path):
  with pytest.raises(ValueError, match="not a model directory"):
    BoxSegmenter(str(tmp_path))
