"""Group advantages and the policy loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.losses.grpo import group_advantages, grpo_loss


def test_literal_advantages_use_the_unbiased_standard_deviation():
  got = group_advantages([0.0, 2.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0], 4)
  std = np.std([0, 2, 1, 1], ddof=1)
  expected = [-1 / (std + 1e-4), 1 / (std + 1e-4), 0, 0, 0, 0, 0, 0]
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert got.dtype == jnp.float32
  biased = -1 / (np.std([0, 2, 1, 1]) + 1e-4)
  assert abs(got[0] - biased) > 0.1


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


def test_a_sample_without_tokens_adds_nothing():
  total, _ = grpo_loss(jnp.zeros((1, 3)), jnp.zeros((1, 3), bool), jnp.ones(1))
  assert float(total) == 0.0
