"""Point sampling against torch's grid_sample, and the choice of uncertain points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vrt_jax.ops.points import point_sample, uncertain_points


def torch_sample(maps: np.ndarray, points: np.ndarray, align_corners: bool = False) -> np.ndarray:
  grid = torch.tensor(2 * points - 1)[:, :, None]
  out = F.grid_sample(
    torch.tensor(maps)[:, None], grid, padding_mode="zeros", align_corners=align_corners
  )
  return out[:, 0, :, 0].numpy()


def test_equals_grid_sample_inside_at_borders_and_outside():
  rng = np.random.default_rng(0)
  maps = rng.normal(size=(3, 5, 8)).astype(np.float32)
  inside = rng.uniform(size=(3, 200, 2))
  corners = np.array([[0, 0], [1, 1], [0, 1], [1, 0], [0.5, 0], [1, 0.3], [0.0625, 0.1]])
  outside = rng.uniform(-0.4, 1.4, size=(3, 50, 2))
  points = np.concatenate([inside, np.tile(corners, (3, 1, 1)), outside], axis=1)
  points = points.astype(np.float32)
  got = point_sample(jnp.asarray(maps), jnp.asarray(points))
  np.testing.assert_allclose(got, torch_sample(maps, points), rtol=1e-5, atol=1e-5)
  assert np.abs(got - torch_sample(maps, points, align_corners=True)).max() > 0.1


def test_literal_values():
  maps = jnp.asarray([[[4.0, 8.0]]])
  points = jnp.asarray([[[0.25, 0.5], [0.75, 0.5], [0.5, 0.5], [0.0, 0.5], [0.25, 0.0]]])
  np.testing.assert_allclose(point_sample(maps, points), [[4, 8, 6, 2, 2]], rtol=1e-6)


def test_gradient_equals_torch():
  rng = np.random.default_rng(1)
  maps = rng.normal(size=(2, 4, 4)).astype(np.float32)
  points = rng.uniform(size=(2, 30, 2)).astype(np.float32)
  weights = rng.normal(size=(2, 30)).astype(np.float32)
  got = jax.grad(lambda m: jnp.sum(point_sample(m, jnp.asarray(points)) * weights))(
    jnp.asarray(maps)
  )
  leaf = torch.tensor(maps, requires_grad=True)
  grid = torch.tensor(2 * points - 1)[:, :, None]
  out = F.grid_sample(leaf[:, None], grid, padding_mode="zeros", align_corners=False)
  (out[:, 0, :, 0] * torch.tensor(weights)).sum().backward()
  np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-5, atol=1e-5)


def halves() -> jnp.ndarray:
  """Two maps whose left halves are uncertain (0.1) and right halves certain (10, -10)."""
  left, right = np.full((2, 8, 4), 0.1), np.full((2, 8, 4), 10.0)
  right[1] *= -1
  return jnp.asarray(np.concatenate([left, right], axis=2), jnp.float32)


def test_three_quarters_are_the_most_uncertain_and_the_rest_is_uniform():
  points = np.asarray(uncertain_points(jax.random.key(0), halves(), 400, 3.0, 0.75))
  assert points.shape == (2, 400, 2)
  assert ((points >= 0) & (points <= 1)).all()
  chosen, rest = points[:, :300], points[:, 300:]
  assert (chosen[..., 0] < 0.5).all()
  assert 0.3 < (rest[..., 0] > 0.5).mean() < 0.7
  assert not np.allclose(points[0], points[1])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_zero_is_uniform_and_share_one_is_uncertain_only(share: float):
  points = np.asarray(uncertain_points(jax.random.key(1), halves(), 200, 3.0, share))
  right = (points[..., 0] > 0.5).mean()
  assert right == 0 if share else 0.35 < right < 0.65


def test_only_the_smallest_magnitudes_of_the_candidates_are_kept():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 16, 16)), jnp.float32)
  every = uncertain_points(jax.random.key(3), logits, 120, 1.0, 1.0)
  best = uncertain_points(jax.random.key(3), logits, 40, 3.0, 1.0)  # the same 120 candidates
  magnitude = np.sort(np.abs(point_sample(logits, every))[0])
  np.testing.assert_allclose(np.sort(np.abs(point_sample(logits, best))[0]), magnitude[:40])


def test_points_carry_no_gradient():
  grads = jax.grad(lambda m: uncertain_points(jax.random.key(0), m, 16, 3.0, 0.75).sum())(halves())
  assert not grads.any()
