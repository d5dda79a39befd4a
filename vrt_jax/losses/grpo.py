"""Group relative policy optimisation, on-policy and without KL (arXiv 2402.03300)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

ADVANTAGE_EPS = 1e-4


def group_advantages(rewards: Float[Array, "B"], group_size: int) -> Float[Array, "B"]:
  """(r - mean) / (std + 1e-4) within each run of `group_size` rewards, float32.

  The standard deviation is the unbiased one (ddof 1), as in the reference (Sa2VAModelGRPOv2);
  equal rewards give zeros. Raises ValueError where B is not a multiple of a group size >= 2.
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  if group_size < 2 or rewards.ndim != 1 or rewards.shape[0] % group_size:
    raise ValueError(
      f"group_advantages: rewards of shape {rewards.shape} do not split into groups of {group_size}"
      " (at least 2)"
    )
  groups = rewards.reshape(-1, group_size)
  centred = groups - groups.mean(axis=1, keepdims=True)
  std = groups.std(axis=1, ddof=1, keepdims=True)
  return (centred / (std + ADVANTAGE_EPS)).reshape(-1)


def grpo_loss(
  per_token_logps: Float[Array, "B T"],
  completion_mask: Bool[Array, "B T"],
  advantages: Float[Array, "B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """(sum over samples of -token mean of ratio * advantage, number of samples), float32.

  ratio = exp(logp - stop_gradient(logp)): its value is 1, its gradient that of logp (one update on
  fresh samples). A sample without completion tokens adds 0.
  """
  logps = per_token_logps.astype(jnp.float32)
  mask = completion_mask.astype(jnp.float32)
  ratio = jnp.exp(logps - jax.lax.stop_gradient(logps))
  per_token = -ratio * advantages.astype(jnp.float32)[:, None]
  per_sample = (per_token * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1.0)
  return per_sample.sum(), jnp.asarray(per_sample.shape[0], jnp.float32)
