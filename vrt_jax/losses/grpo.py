"""Group relative policy optimisation (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783)."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

ADVANTAGE_EPS = 1e-4

Normalisation = Literal["grpo", "dr_grpo"]


def group_advantages(
  rewards: Float[ArrayLike, "B"] | Sequence[float], group_size: int, normalise: bool = True
) -> Float[Array, "B"]:
  """(r - mean) / (std + 1e-4) within each run of `group_size` rewards, float32.

  The standard deviation is the unbiased one (ddof 1), as in the reference (Sa2VAModelGRPOv2);
  equal rewards give zeros. `normalise` False leaves it out (Dr. GRPO). Raises ValueError where B is
  not a multiple of a group size >= 2.
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  if group_size < 2 or rewards.ndim != 1 or rewards.shape[0] % group_size:
    raise ValueError(
      f"group_advantages: rewards of shape {rewards.shape} do not split into groups of {group_size}"
      " (at least 2)"
    )
  groups = rewards.reshape(-1, group_size)
  centred = groups - groups.mean(axis=1, keepdims=True)
  if not normalise:
    return centred.reshape(-1)
  std = groups.std(axis=1, ddof=1, keepdims=True)
  return (centred / (std + ADVANTAGE_EPS)).reshape(-1)


def grpo_loss(
  per_token_logps: Float[Array, "B T"],
  completion_mask: Bool[Array, "B T"],
  advantages: Float[Array, "B"] | Float[Array, "B T"],
  *,
  old_logps: Float[Array, "B T"] | None = None,
  epsilon: float = 0.2,
  normalisation: Normalisation = "grpo",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """(sum over samples of -min(ratio A, clip(ratio) A), number of samples), float32.

  An advantage A belongs to a sample or to a token.
  ratio = exp(logp - old logp), clipped to 1 -+ epsilon. Without `old_logps` the old policy is the
  policy itself, detached: the ratio's value is 1, its gradient that of logp (one update on fresh
  samples, as in the reference). A sample's tokens are averaged ("grpo"; one without tokens adds 0)
  or summed and divided by T, which is the same for all samples ("dr_grpo").
  """
  free, bounded = _objectives(per_token_logps, completion_mask, advantages, old_logps, epsilon)
  total = _over_tokens(-jnp.minimum(free, bounded), completion_mask, normalisation)
  return total, jnp.asarray(advantages.shape[0], jnp.float32)


def clipped_tokens(
  per_token_logps: Float[Array, "B T"],
  completion_mask: Bool[Array, "B T"],
  advantages: Float[Array, "B"] | Float[Array, "B T"],
  *,
  old_logps: Float[Array, "B T"] | None = None,
  epsilon: float = 0.2,
) -> Float[Array, ""]:
  """Number of completion tokens that clipping leaves without gradient."""
  free, bounded = _objectives(per_token_logps, completion_mask, advantages, old_logps, epsilon)
  return jnp.sum((bounded < free) & completion_mask).astype(jnp.float32)


def kl_divergence(
  per_token_logps: Float[Array, "B T"],
  reference_logps: Float[Array, "B T"],
  completion_mask: Bool[Array, "B T"],
  normalisation: Normalisation = "grpo",
) -> Float[Array, ""]:
  """Sum over samples of exp(d) - d - 1, d = reference logp - logp, float32.

  The k3 estimator of KL(policy || reference), never negative; tokens count as in `grpo_loss`. There
  is no gradient to the reference.
  """
  reference = jax.lax.stop_gradient(reference_logps.astype(jnp.float32))
  difference = reference - per_token_logps.astype(jnp.float32)
  difference = jnp.where(completion_mask, difference, 0.0)
  return _over_tokens(jnp.expm1(difference) - difference, completion_mask, normalisation)


def _objectives(
  logps: Array, mask: Array, advantages: Array, old_logps: Array | None, epsilon: float
) -> tuple[Array, Array]:
  """[B, T] ratio * advantage, and the same with the clipped ratio."""
  logps = logps.astype(jnp.float32)
  old = jax.lax.stop_gradient(logps if old_logps is None else old_logps.astype(jnp.float32))
  ratio = jnp.exp(jnp.where(mask, logps - old, 0.0))
  weights = advantages.astype(jnp.float32).reshape(len(advantages), -1)
  return ratio * weights, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * weights


def _over_tokens(per_token: Array, mask: Array, normalisation: Normalisation) -> Array:
  counted = mask.astype(jnp.float32)
  length = jnp.maximum(counted.sum(axis=1), 1.0)
  if normalisation == "dr_grpo":
    length = jnp.full_like(length, mask.shape[1])
  return jnp.sum((per_token * counted).sum(axis=1) / length)
