"""IoU, matching and rewards on the device against numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vrt_jax.metrics import device
from vrt_jax.metrics import match_ious as numpy_match
from vrt_jax.ops.masks import iou_matrix as numpy_ious
from vrt_jax.rl.rewards import answer_reward

CASES, PRED, TRUE, SIDE = 200, 6, 4, 16


def rectangles(rng: np.random.Generator, count: int) -> np.ndarray:
  """Rectangles of which some are equal and some are empty."""
  masks = np.zeros((count, SIDE, SIDE), bool)
  for mask in masks:
    y, x = rng.integers(0, 3, 2) * 4
    mask[y : y + rng.integers(0, 3) * 4, x : x + rng.integers(0, 10)] = True
  return masks


@pytest.fixture(scope="module")
def cases():
  """Padded masks, of which any number counts, none included."""
  rng = np.random.default_rng(0)
  counts = rng.integers(0, [PRED + 1, TRUE + 1], (CASES, 2))
  pred = np.stack([rectangles(rng, PRED) for _ in range(CASES)])
  gt = np.stack([rectangles(rng, TRUE) for _ in range(CASES)])
  gt[::3, 0] = pred[::3, 0]  # perfect pairs
  valid = [np.arange(size) < counts[:, [i]] for i, size in enumerate((PRED, TRUE))]
  return pred, gt, *valid


@pytest.fixture(scope="module")
def ious(cases):
  return jax.jit(jax.vmap(device.iou_matrix))(*cases)


def test_ious_equal_those_of_numpy(cases, ious):
  for i, (pred, gt, pv, gv) in enumerate(zip(*cases, strict=True)):
    expected = np.zeros((PRED, TRUE))
    expected[: pv.sum(), : gv.sum()] = numpy_ious(pred[pv], gt[gv])
    np.testing.assert_allclose(ious[i], expected, atol=1e-6)


def test_masks_of_one_pixel_count():
  one = np.zeros((1, 2, 2), bool)
  one[0, 1, 0] = True
  valid = np.ones(1, bool)
  assert device.iou_matrix(one, one, valid, valid).item() == 1
  assert device.iou_matrix(one, ~one, valid, valid).item() == 0


def test_partners_have_the_best_total(cases, ious):
  got = np.asarray(jax.jit(jax.vmap(device.match_ious))(ious, *cases[2:]))
  ties = 0
  for i, (pred, gt, pv, gv) in enumerate(zip(*cases, strict=True)):
    expected = numpy_match(list(pred[pv]), list(gt[gv]))
    assert got[i].sum() == pytest.approx(sum(expected), abs=1e-6)
    assert not got[i][gv.sum() :].any()
    ties += not np.allclose(got[i][: gv.sum()], expected, atol=1e-6)
  assert ties < CASES / 20  # other partners of the same total


def test_totals_equal_scipys_with_many_ties():
  rng = np.random.default_rng(1)
  ious = rng.integers(0, 3, (300, 5, 7)).astype(np.float32) / 2
  everything = np.ones((300, 5), bool), np.ones((300, 7), bool)
  got = jax.jit(jax.vmap(device.match_ious))(ious, *everything)
  for one, total in zip(ious, np.asarray(got).sum(axis=1), strict=True):
    assert total == one[linear_sum_assignment(-one)].sum()


def test_rewards_equal_those_of_numpy(cases, ious):
  got = jax.jit(jax.vmap(device.matched_reward))(ious, *cases[2:])
  earned = 0
  for i, (pred, gt, pv, gv) in enumerate(zip(*cases, strict=True)):
    logits = np.where(pred[pv], 4.0, -4.0)
    expected = answer_reward(logits, gt[gv].astype(np.uint8), range(pv.sum()))
    assert float(got[i]) == pytest.approx(expected, abs=1e-6)
    earned += expected != 0
  assert CASES / 10 < earned < CASES


def test_greedy_partners_would_not_do():
  ious = jnp.asarray([[0.9, 0.8], [0.8, 0.0]])
  both = jnp.ones(2, bool)
  np.testing.assert_allclose(device.match_ious(ious, both, both), [0.8, 0.8])


def test_no_masks_at_all():
  none = jnp.zeros((0, 4, 4), bool), jnp.zeros(0, bool)
  one = jnp.ones((1, 4, 4), bool), jnp.ones(1, bool)
  ious = device.iou_matrix(none[0], one[0], none[1], one[1])
  assert device.match_ious(ious, none[1], one[1]).tolist() == [0]
  assert device.matched_reward(ious, none[1], one[1]) == 0
