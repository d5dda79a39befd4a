"""Assignment of predicted to ground-truth masks."""

import itertools

import numpy as np
import pytest

from vrt_jax.metrics import match_ious
from vrt_jax.ops.masks import encode_rle, iou_matrix


def strip(start: int, stop: int) -> np.ndarray:
  mask = np.zeros((4, 20), bool)
  mask[:, start:stop] = True
  return mask


def test_literal_values_one_a_ground_truth_mask():
  gt = [strip(0, 4), strip(4, 8), strip(10, 14)]
  pred = [strip(4, 8), strip(0, 3)]
  assert match_ious(pred, gt) == [0.75, 1.0, 0.0]
  assert match_ious([encode_rle(m) for m in pred], [encode_rle(m) for m in gt]) == [0.75, 1.0, 0.0]


def test_total_is_maximised_not_greedy():
  gt = [strip(0, 10), strip(4, 10)]
  pred = [strip(2, 10), strip(0, 9)]
  ious = match_ious(pred, gt)
  assert ious == pytest.approx([0.9, 0.75])


def test_empty_sides():
  assert match_ious([], []) == []
  assert match_ious([strip(0, 2)], []) == []
  assert match_ious([], [strip(0, 2), strip(3, 4)]) == [0.0, 0.0]
  assert match_ious([strip(0, 0)], [strip(0, 0)]) == [0.0]


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_best_permutation(seed):
  rng = np.random.default_rng(seed)
  pred, gt = rng.random((4, 9, 9)) < 0.5, rng.random((3, 9, 9)) < 0.5
  ious = iou_matrix(pred, gt)
  best = max(sum(ious[list(p), range(3)]) for p in itertools.permutations(range(4), 3))
  assert sum(match_ious(pred, gt)) == pytest.approx(best)


def test_different_sizes_raise():
  with pytest.raises(ValueError, match="mask size: "):
    match_ious([np.ones((2, 3))], [np.ones((3, 2))])
