"""Choosing the next token from logits."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, Key

from vrt_jax.ops.sharding import platform

DRAW_BLOCK = 512
"""Tokens whose weights are summed before a block is chosen."""
DRAWS = 16
"""How often a token is drawn that must lie in the nucleus, before the nucleus is searched for."""


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
    return draw_in_nucleus(keys, logits, sampling.top_p)
  return draw(jax.vmap(jax.random.uniform)(keys), jax.nn.softmax(logits, axis=-1))


def draw_in_nucleus(
  keys: Key[Array, "R"], logits: Float[Array, "R V"], top_p: float
) -> Int32[Array, "R"]:
  """A token of each row's nucleus, in proportion to their probabilities.

  Drawn from all tokens, and again where the tokens above it already have `top_p` of the
  probability: two passes over the row a draw, most of which are good. The nucleus itself takes 32
  passes; it is searched for only where `DRAWS` draws of a row were not good.
  """
  probs = jax.nn.softmax(logits, axis=-1)

  def numbers(count: Array | int) -> Float[Array, "R"]:
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, count)))(keys)

  def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    count, token, good = carry
    token = jnp.where(good, token, draw(numbers(count), probs))
    own = jnp.take_along_axis(logits, token[:, None], axis=1)
    above = jnp.sum(jnp.where(logits > own, probs, 0.0), axis=-1)
    return count + 1, token, above < top_p

  rows = len(logits)
  _, token, good = jax.lax.while_loop(
    lambda carry: (carry[0] < DRAWS) & ~jnp.all(carry[2]),
    attempt,
    (jnp.int32(0), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)),
  )

  def search() -> Int32[Array, "R"]:
    inside = jnp.where(nucleus(logits, top_p), probs, 0.0)
    return jnp.where(good, token, draw(numbers(DRAWS), inside))

  return jax.lax.cond(jnp.all(good), lambda: token, search)


def draw(uniform: Float[Array, "R"], weights: Float[Array, "R V"]) -> Int32[Array, "R"]:
  """For numbers in [0, 1) the tokens at which the running sum of the weights passes their share.

  One random number a row, where the Gumbel trick takes one a token: at 152 k tokens these are a
  fifth of decoding on a CPU. The sum runs over blocks and then inside one.
  """
  blocks = _blocks(weights, 0.0)
  sums = jnp.sum(blocks, axis=-1)
  before = jnp.cumsum(sums, axis=-1)
  target = uniform[:, None] * before[:, -1:]
  block = _first_above(before, target)[:, None]
  rest = target - jnp.take_along_axis(before - sums, block, axis=1)
  inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  return block[:, 0] * DRAW_BLOCK + _first_above(jnp.cumsum(inside, axis=-1), rest)


def _first_above(sums: Float[Array, "R N"], target: Float[Array, "R 1"]) -> Int32[Array, "R"]:
  """Where running sums first exceed the target, which rounding must not put at their end."""
  return jnp.argmax(sums > jnp.minimum(target, sums[:, -1:] * (1 - 1e-6)), axis=-1)


def logp_and_entropy(
  logits: Float[Array, "*R V"], tokens: Int32[Array, "*R"]
) -> tuple[Float[Array, "*R"], Float[Array, "*R"]]:
  """log softmax(logits)[tokens], and the softmax's entropy in nats."""
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  top = _over_row(jnp.max, logits, -jnp.inf)
  below = logits - top[..., None]
  weights = jnp.exp(below)
  total, product = (_over_row(jnp.sum, x, 0.0) for x in (weights, weights * below))
  return picked - top - jnp.log(total), jnp.log(total) - product / total


def _over_row(
  reduce: Callable[..., Array], x: Float[Array, "*R V"], neutral: float
) -> Float[Array, "*R"]:
  """`reduce` over the last axis; CPUs reduce a long row on one core, so blocks of it come first."""
  if platform() == "cpu":
    x = reduce(_blocks(x, neutral), axis=-1)
  return reduce(x, axis=-1)


def _blocks(x: Float[Array, "*R V"], fill: float) -> Float[Array, "*R K block"]:
  """The last axis in blocks of `DRAW_BLOCK`, the last of which is filled up."""
  rest = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % DRAW_BLOCK)]
  return jnp.pad(x, rest, constant_values=fill).reshape(*x.shape[:-1], -1, DRAW_BLOCK)


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
