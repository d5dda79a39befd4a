"""Run-length encoding, sizes, unions and IoU."""

import numpy as np
import pytest
from pycocotools import mask as coco

from vrt_jax.ops.masks import (
  as_rle,
  check_mask_size,
  decode_rle,
  decode_rle_nearest,
  encode_rle,
  iou_matrix,
  union_rle,
)
from vrt_jax.ops.resize import resize_nearest_numpy


def random_masks(seed: int, count: int, size: tuple[int, int] = (37, 23)) -> np.ndarray:
  rng = np.random.default_rng(seed)
  masks = np.zeros((count, *size), bool)
  for mask in masks:
    y, x = rng.integers(0, size[0] - 5), rng.integers(0, size[1] - 5)
    h, w = rng.integers(1, size[0] - y), rng.integers(1, size[1] - x)
    mask[y : y + h, x : x + w] = rng.random((h, w)) < rng.choice([0.3, 0.9, 1.0])
  return masks


def dense_ious(pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
  intersection = (pred[:, None] & gt[None]).sum((2, 3))
  union = (pred[:, None] | gt[None]).sum((2, 3))
  return np.where(union > 0, intersection / np.maximum(union, 1), 0).astype(np.float32)


def test_literal_rle_is_column_major_and_starts_with_background():
  mask = np.array([[0, 1], [1, 1]])
  assert encode_rle(mask) == {"size": [2, 2], "counts": "13"}
  assert as_rle({"size": [2, 2], "counts": [1, 3]}) == encode_rle(mask)
  assert (decode_rle({"size": [2, 2], "counts": [1, 3]}) == mask.astype(bool)).all()


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_and_agreement_with_pycocotools(seed):
  for mask in random_masks(seed, 3, (70, 90)):
    rle = encode_rle(mask)
    assert (decode_rle(rle) == mask).all()
    assert (decode_rle({**rle, "counts": rle["counts"].encode()}) == mask).all()
    assert (coco.decode(rle).astype(bool) == mask).all()
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=~mask[0, 0], append=2))).tolist()
    runs = ([0] if mask[0, 0] else []) + runs
    assert as_rle({"size": list(mask.shape), "counts": runs}) == rle


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("target", [(16, 16), (37, 23), (100, 60), (1, 1), (7, 64)])
def test_decoding_to_a_grid_equals_decoding_and_resizing(target, mode):
  masks = [*random_masks(3, 6), np.zeros((37, 23)), np.ones((37, 23)), np.eye(37, 23)]
  for mask in masks:
    rle = encode_rle(mask)
    small = decode_rle_nearest(rle, target, mode)
    np.testing.assert_array_equal(small, resize_nearest_numpy(decode_rle(rle), target, mode))
    assert small.dtype == bool
  other = {"nearest": "nearest-exact", "nearest-exact": "nearest"}[mode]
  if target == (16, 16):
    assert (small != decode_rle_nearest(rle, target, other)).any()
  with pytest.raises(ValueError, match=r"^RLE: "):
    decode_rle_nearest({"size": [4, 5], "counts": [3]}, target, mode)


@pytest.mark.parametrize("mask", [np.zeros((5, 7)), np.ones((5, 7)), np.full((1500, 2250), 255)])
def test_uniform_masks(mask):
  assert (decode_rle(encode_rle(mask)) == (mask > 0)).all()


@pytest.mark.parametrize(
  "rle",
  [
    {"size": [2, 2]},
    {"counts": "13"},
    "13",
    {"size": [2], "counts": "13"},
    {"size": [2, "2"], "counts": "13"},
    {"size": [0, 2], "counts": ""},
    {"size": [2, 3], "counts": "13"},
    {"size": [2, 2], "counts": ""},
    {"size": [2, 2], "counts": "1 3"},
    {"size": [2, 2], "counts": "1\u20ac"},
    {"size": [2, 2], "counts": "1Q"},
    {"size": [2, 2], "counts": "o" * 40 + "0"},
    {"size": [2, 2], "counts": [1, 4]},
    {"size": [2, 2], "counts": [-1, 5]},
    {"size": [2, 2], "counts": [1.5, 2.5]},
    {"size": [2, 2], "counts": None},
  ],
)
def test_malformed_rles_raise(rle):
  with pytest.raises(ValueError, match="RLE: "):
    decode_rle(rle)
  with pytest.raises(ValueError, match=r"RLE: |mask: expected"):
    as_rle(rle)


def test_union_of_overlapping_rles():
  masks = random_masks(3, 3)
  union = union_rle([encode_rle(masks[0]), masks[1], encode_rle(masks[2])])
  assert (decode_rle(union) == masks.any(0)).all()
  with pytest.raises(ValueError, match="no mask"):
    union_rle([])
  with pytest.raises(ValueError, match="mask size: "):
    union_rle([np.ones((2, 3)), np.ones((3, 2))])


def test_mask_size_check():
  check_mask_size(encode_rle(np.ones((2, 3))), (2, 3))
  with pytest.raises(ValueError, match=r"mask size: the mask is 2x3 .* the image 3x2"):
    check_mask_size(np.ones((2, 3)), (3, 2))


@pytest.mark.parametrize("seed", range(10))
def test_iou_matrix_equals_dense_arithmetic(seed):
  pred, gt = random_masks(seed, 6), random_masks(seed + 100, 4)
  pred[0], gt[0] = False, False
  expected = dense_ious(pred, gt)
  assert expected[0, 0] == 0
  got = iou_matrix(pred, gt)
  assert got.dtype == np.float32 and (got == expected).all()
  assert (iou_matrix([encode_rle(m) for m in pred], list(gt)) == expected).all()


def test_iou_matrix_without_masks_and_with_wrong_sizes():
  assert iou_matrix([], [np.ones((2, 2))]).shape == (0, 1)
  assert iou_matrix([np.ones((2, 2))], []).shape == (1, 0)
  with pytest.raises(ValueError, match="mask size: "):
    iou_matrix([np.ones((2, 3))], [np.ones((3, 2))])
