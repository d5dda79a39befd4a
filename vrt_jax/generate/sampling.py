"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, Key


@dataclass(frozen=True)
class Sampling:
  """Temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability."""

  temperature: float = 0.0
  top_p: float = 1.0


def sample(
  key: Key[Array, ""],
  logits: Float[Array, "B V"],
  sampling: Sampling,
  forbidden: Bool[Array, "V"],
) -> Int32[Array, "B"]:
  """Next tokens; `forbidden` ones (vision and padding tokens) are never chosen."""
  logits = jnp.where(forbidden, -jnp.inf, logits.astype(jnp.float32))
  if sampling.temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_p < 1.0:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = before < sampling.top_p
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
