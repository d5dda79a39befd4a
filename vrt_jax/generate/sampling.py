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
  keys: Key[Array, "R"],
  logits: Float[Array, "R V"],
  sampling: Sampling,
  forbidden: Bool[Array, "V"],
) -> Int32[Array, "R"]:
  """Next tokens, each row with its own key; `forbidden` ones are never chosen."""
  logits = jnp.where(forbidden, -jnp.inf, logits.astype(jnp.float32))
  if sampling.temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_p < 1.0:
    logits = jnp.where(nucleus(logits, sampling.top_p), logits, -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: Float[Array, "R V"], top_p: float) -> Bool[Array, "R V"]:
  """Where the tokens above have less than `top_p` of the probability; equal logits go together.

  Exact without sorting: the smallest such logit is found by halving the range of float32 numbers
  32 times, each with a pass over the row (a sort of 152 k logits takes several times as long).
  """
  probs = jax.nn.softmax(logits, axis=-1)
  bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
  ranks = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the logits

  def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    outside, inside = bounds
    middle = (outside & inside) + ((outside ^ inside) >> 1)  # their mean, without overflow
    above = jnp.sum(jnp.where(ranks > middle, probs, 0.0), axis=-1, keepdims=True)
    is_inside = above < top_p
    return jnp.where(is_inside, outside, middle), jnp.where(is_inside, middle, inside)

  best = jnp.max(ranks, axis=-1, keepdims=True)
  lowest = jnp.full_like(best, jnp.iinfo(jnp.int32).min)
  _, smallest = jax.lax.fori_loop(0, 32, halve, (lowest, best))
  return ranks >= smallest
