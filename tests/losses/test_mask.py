"""BCE and dice against torch at given points, and the sums over sampled points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vrt_jax.config import SftLossConfig
from vrt_jax.losses.mask import mask_losses, merged_masks, point_bce, point_dice


@pytest.fixture(scope="module")
def at_points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=(4, 50))).astype(np.float32)
  targets = rng.uniform(size=(4, 50)).astype(np.float32)  # bilinear samples lie between 0 and 1
  return logits, targets, np.array([1, 1, 0, 1], np.float32)


def torch_losses(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor):
  """(sum of mean BCE, sum of dice) as the recipe states them."""
  bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
  p = logits.sigmoid()
  dice = 1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)
  return (bce * valid).sum(), (dice * valid).sum()


def test_values_and_gradients_equal_torch_at_given_points(at_points):
  logits, targets, valid = at_points
  leaf = torch.tensor(logits, requires_grad=True)
  expected = torch_losses(leaf, torch.tensor(targets), torch.tensor(valid))
  for function, value in zip((point_bce, point_dice), expected, strict=True):
    got, grads = jax.value_and_grad(function)(jnp.asarray(logits), targets, valid)
    np.testing.assert_allclose(got, value.item(), rtol=1e-5)
    (expected_grads,) = torch.autograd.grad(value, leaf, retain_graph=True)
    np.testing.assert_allclose(grads, expected_grads.numpy(), rtol=1e-4, atol=1e-6)
    assert not grads[2].any()  # the invalid row


def test_literal_dice():
  logits = jnp.asarray([[100.0, 100.0, -100.0, -100.0]])
  one = jnp.ones(1)
  assert float(point_dice(logits, jnp.asarray([[1.0, 1, 0, 0]]), one)) == pytest.approx(0)
  # nothing in common: 1 - (0 + 1) / (2 + 2 + 1)
  assert float(point_dice(logits, jnp.asarray([[0.0, 0, 1, 1]]), one)) == pytest.approx(0.8)
  # an empty mask predicted empty costs nothing
  empty = jnp.full((1, 4), -100.0)
  assert float(point_dice(empty, jnp.zeros((1, 4)), one)) == pytest.approx(0)


def test_extreme_logits_stay_finite():
  logits = jnp.asarray([[1e4, -1e4]])
  value, grads = jax.value_and_grad(point_bce)(logits, jnp.asarray([[0.0, 1.0]]), jnp.ones(1))
  assert float(value) == pytest.approx(1e4)
  assert np.isfinite(grads).all()


def test_sampled_losses_of_constant_maps_equal_the_formula_away_from_borders():
  """On maps that are wide and constant, only points within half a cell of the border differ."""
  config = SftLossConfig(num_points=512, importance_share=0.0)
  logits = jnp.full((1, 2, 256, 256), 2.0).at[0, 1].set(-1.0)
  masks = np.ones((1, 2, 256, 256), np.uint8)
  valid = np.array([[True, True]])
  bce, dice, count = mask_losses(jax.random.key(0), logits, masks, valid, config)
  expected = torch_losses(
    torch.tensor([[2.0], [-1.0]]).expand(2, 512), torch.ones(2, 512), torch.ones(2)
  )
  assert float(count) == 2
  np.testing.assert_allclose([bce, dice], [float(x) for x in expected], rtol=2e-2)


def test_invalid_masks_count_for_nothing_and_keys_matter():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(2, 2, 16, 16)), jnp.bfloat16)
  masks = rng.integers(0, 2, (2, 2, 16, 16)).astype(np.uint8)
  config = SftLossConfig(num_points=32)
  valid = np.array([[True, False], [True, True]])
  key = jax.random.key(0)
  first = mask_losses(key, logits, masks, valid, config)
  changed = mask_losses(key, logits.at[0, 1].set(9.0), masks, valid, config)
  assert float(first[2]) == 3
  np.testing.assert_array_equal(first, changed)
  assert all(x.dtype == jnp.float32 for x in first)
  other = mask_losses(jax.random.key(1), logits, masks, valid, config)
  assert float(other[0]) != float(first[0])
  none = mask_losses(key, logits, masks, np.zeros_like(valid), config)
  assert [float(x) for x in none] == [0, 0, 0]


def numpy_merge(logits: np.ndarray, has: np.ndarray, answer: np.ndarray, merge: str) -> np.ndarray:
  """Mask by mask, as the words of the rule."""
  merged = np.zeros((len(logits), *logits.shape[2:]), np.float32)
  for row, (maps, there, is_answer) in enumerate(zip(logits, has, answer, strict=True)):
    if merge == "reference":
      kept = [m if a else 0 * m for m, t, a in zip(maps, there, is_answer, strict=True) if t]
    else:
      kept = [m for m, t, a in zip(maps, there, is_answer, strict=True) if t and a]
    if kept:
      merged[row] = np.max(kept, axis=0)
  return merged


@pytest.mark.parametrize("merge", ["reference", "answers"])
def test_merged_masks(merge: str):
  """Rows: answer beside reasoning, answer alone, reasoning alone, none; unused slots hold 9."""
  rng = np.random.default_rng(0)
  has = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  answer = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
  logits = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
  logits[~has] = 9.0
  found, counts = merged_masks(jnp.asarray(logits), jnp.asarray(has), jnp.asarray(answer), merge)
  np.testing.assert_array_equal(found, numpy_merge(logits, has, answer, merge))
  assert counts.tolist() == [True, True, merge == "reference", False]
  floor = np.asarray(found)[0].min()
  assert floor == 0 if merge == "reference" else floor < -0.1
  assert np.asarray(found)[1].min() < -0.1  # answers alone have no floor
  grads = jax.grad(lambda x: jnp.sum(merged_masks(x, has, answer, merge)[0]))(jnp.asarray(logits))
  assert np.isfinite(grads).all()
  assert not np.asarray(grads)[~(has & answer)].any()
