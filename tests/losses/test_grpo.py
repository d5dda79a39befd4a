"""Group advantages and the policy's objective, against torch where it is more than a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vrt_jax.losses.grpo import clipped_tokens, group_advantages, grpo_loss, kl_divergence


def test_literal_advantages_use_the_unbiased_standard_deviation():
  got = group_advantages([0.0, 2.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0], 4)
  std = np.std([0, 2, 1, 1], ddof=1)
  expected = [-1 / (std + 1e-4), 1 / (std + 1e-4), 0, 0, 0, 0, 0, 0]
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert got.dtype == jnp.float32
  biased = -1 / (np.std([0, 2, 1, 1]) + 1e-4)
  assert abs(got[0] - biased) > 0.1


def test_without_normalisation_advantages_are_differences_from_the_mean():
  got = group_advantages([0.0, 3.0, 5.0, 5.0], 2, normalise=False)
  assert got.tolist() == [-1.5, 1.5, 0.0, 0.0]


@pytest.mark.parametrize(("count", "group"), [(4, 1), (6, 4), (4, 0)])
def test_groups_that_do_not_divide_raise(count, group):
  with pytest.raises(ValueError, match="group_advantages"):
    group_advantages(np.zeros(count), group)


def test_loss_value_and_gradient():
  logps = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  advantages = jnp.array([2.0, -1.0])
  total, count = grpo_loss(logps, mask, advantages)
  assert (float(total), float(count)) == (-1.0, 2.0)
  grads = jax.grad(lambda x: grpo_loss(x, mask, advantages)[0])(logps)
  np.testing.assert_allclose(grads, [[-1.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
  assert float(clipped_tokens(logps, mask, advantages)) == 0


def test_a_sample_without_tokens_adds_nothing():
  total, _ = grpo_loss(jnp.zeros((1, 3)), jnp.zeros((1, 3), bool), jnp.ones(1))
  assert float(total) == 0.0


ROWS, SLOTS = 6, 9


def case() -> dict[str, np.ndarray]:
  """Old and new log-probabilities up to 0.5 apart; both signs of advantages; a full last row."""
  rng = np.random.default_rng(0)
  old = -rng.exponential(2.0, (ROWS, SLOTS)).astype(np.float32)
  lengths = np.array([9, 4, 1, 7, 3, 9])
  return {
    "old": old,
    "logps": old + rng.uniform(-0.5, 0.5, old.shape).astype(np.float32),
    "reference": old + rng.uniform(-0.5, 0.5, old.shape).astype(np.float32),
    "mask": np.arange(SLOTS) < lengths[:, None],
    "advantages": np.array([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], np.float32),
  }


def torch_objective(
  normalisation: str, epsilon: float, kl_weight: float
) -> tuple[float, np.ndarray]:
  """(loss, gradient to the log-probabilities) of policy and KL, sample by sample."""
  c = {name: torch.tensor(value) for name, value in case().items()}
  logps = c["logps"].requires_grad_()
  total = torch.zeros(())
  for row in range(ROWS):
    keep = c["mask"][row]
    new, old, reference = logps[row][keep], c["old"][row][keep], c["reference"][row][keep]
    ratio, a = torch.exp(new - old), c["advantages"][row]
    policy = -torch.minimum(ratio * a, torch.clamp(ratio, 1 - epsilon, 1 + epsilon) * a)
    kl = torch.exp(reference - new) - (reference - new) - 1
    length = keep.sum() if normalisation == "grpo" else SLOTS
    total = total + (policy + kl_weight * kl).sum() / length
  total.backward()
  return total.item(), logps.grad.numpy()


@pytest.mark.parametrize("normalisation", ["grpo", "dr_grpo"])
def test_objective_and_gradient_equal_torch(normalisation: str):
  c = case()

  def loss(logps: jax.Array) -> jax.Array:
    policy, count = grpo_loss(
      logps,
      c["mask"],
      c["advantages"],
      old_logps=c["old"],
      epsilon=0.2,
      normalisation=normalisation,
    )
    assert count == ROWS
    return policy + 0.3 * kl_divergence(logps, c["reference"], c["mask"], normalisation)

  value, grads = jax.value_and_grad(loss)(jnp.asarray(c["logps"]))
  wanted, wanted_grads = torch_objective(normalisation, 0.2, 0.3)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(grads, wanted_grads, rtol=1e-4, atol=1e-6)
  unclipped, unclipped_grads = torch_objective(normalisation, 10.0, 0.3)
  assert abs(unclipped - wanted) > 1e-2
  assert np.abs(unclipped_grads - wanted_grads).max() > 1e-2


def test_clipped_tokens_are_those_without_gradient():
  c = case()

  def loss(logps: jax.Array) -> jax.Array:
    return grpo_loss(logps, c["mask"], c["advantages"], old_logps=c["old"], epsilon=0.2)[0]

  grads = np.asarray(jax.grad(loss)(jnp.asarray(c["logps"])))
  without = c["mask"] & (grads == 0) & (c["advantages"] != 0)[:, None]
  found = clipped_tokens(
    jnp.asarray(c["logps"]), c["mask"], c["advantages"], old_logps=c["old"], epsilon=0.2
  )
  assert float(found) == without.sum() > 3


def test_log_probabilities_after_the_end_may_be_anything():
  c = case()
  wild = np.where(c["mask"], c["logps"], np.inf)

  def loss(logps: jax.Array) -> jax.Array:
    policy, _ = grpo_loss(logps, c["mask"], c["advantages"], old_logps=c["old"])
    return policy + kl_divergence(logps, c["reference"], c["mask"])

  value, grads = jax.value_and_grad(loss)(jnp.asarray(wild))
  np.testing.assert_allclose(value, loss(jnp.asarray(c["logps"])), rtol=1e-6)
  assert np.isfinite(grads).all()


def test_divergence_is_zero_only_for_the_reference_itself():
  c = case()
  logps = jnp.asarray(c["logps"])
  assert float(kl_divergence(logps, logps, c["mask"])) == 0
  assert float(kl_divergence(logps, c["reference"], c["mask"])) > 0.1
  grads = jax.grad(lambda r: kl_divergence(logps, r, c["mask"]))(jnp.asarray(c["reference"]))
  assert not np.asarray(grads).any()
