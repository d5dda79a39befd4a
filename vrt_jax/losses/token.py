"""Language-model losses on hidden states; the [B, T, V] logits never exist as a whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from vrt_jax.ops.attention_mask import MASKED
from vrt_jax.ops.sharding import (
  by_device,
  constrain_batch,
  devices_of_batch,
  rows_by_device,
  rows_by_tensor,
  rows_per_device,
  tensor_parts,
)
from vrt_jax.types import IGNORE_INDEX

LOGIT_BYTES = 128 * 2**20
"""Target size of one chunk of float32 logits on a device."""
MIN_CHUNK = 8


def token_logps(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  tokens: Int32[Array, "B T"],
  counted: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
  """log p(tokens[t] | hidden[t]) in float32 where `counted`, else 0.

  `hidden` is the output of the final norm, `head` the output embedding. Chunks of positions are
  taken one after the other; one in which nothing counts costs nothing. With the logits at hand the
  slope by `hidden` is computed too, so that only a trained head needs them again. The batch stays
  divided over the mesh, and the head is gathered once.
  """
  b, t, _ = hidden.shape
  vocabulary, head = len(head), rows_by_tensor(head.astype(hidden.dtype))
  position_bytes = 4 * len(head) // tensor_parts() * rows_per_device(b)
  chunk = min(t, max(MIN_CHUNK, LOGIT_BYTES // position_bytes))
  num_chunks = -(-t // chunk)
  chunk = -(-t // num_chunks)
  pad = num_chunks * chunk - t

  def chunks(x: Array) -> Array:
    """[B, T, ..] -> [chunks, B, Tc, ..]."""
    x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
    x = jnp.moveaxis(x.reshape(b, num_chunks, chunk, *x.shape[2:]), 1, 0)
    return constrain_batch(x, axis=1)

  kept = chunks(counted)
  needed = jnp.any(kept, axis=(1, 2))
  logps = _logps_of_chunks(vocabulary, chunks(hidden), head, chunks(tokens), needed)
  logps = jnp.where(kept, logps, 0.0)
  return jnp.moveaxis(logps, 0, 1).reshape(b, -1)[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps_of_chunks(
  vocabulary: int,
  hidden: Float[Array, "C B Tc D"],
  head: Float[Array, "Vp D"],
  tokens: Int32[Array, "C B Tc"],
  needed: Bool[Array, "C"],
) -> Float[Array, "C B Tc"]:
  """Zeros for the chunks that are not needed; the head's rows from `vocabulary` on are padding."""

  def chunk(xs: tuple[Array, Array]) -> Array:
    x, token = xs
    return _logps(_logits(x, head, vocabulary), token)[0]

  return _map_needed(chunk, needed, (hidden, tokens))


def _forward(
  vocabulary: int, hidden: Array, head: Array, tokens: Array, needed: Array
) -> tuple[Array, tuple]:
  def chunk(xs: tuple[Array, Array]) -> tuple[Array, Array]:
    x, token = xs
    logps, slope = _logps(_logits(x, head, vocabulary), token)
    return logps, jnp.einsum("btv,vd->btd", slope.astype(x.dtype), head)

  logps, slopes = _map_needed(chunk, needed, (hidden, tokens))
  return logps, (slopes, hidden, head, tokens, needed)


def _backward(vocabulary: int, kept: tuple, by_logps: Float[Array, "C B Tc"]) -> tuple:
  slopes, hidden, head, tokens, needed = kept
  devices = devices_of_batch(hidden.shape[1])

  def chunk(total: Array, xs: tuple[Array, ...]) -> tuple[Array, None]:
    x, token, factor, needed = xs

    def add() -> Array:
      slope = factor[..., None] * _logps(_logits(x, head, vocabulary), token)[1]
      rows, slope = rows_by_device(x), rows_by_device(slope.astype(x.dtype))
      return by_device(total + jnp.einsum("nbtv,nbtd->nvd", slope, rows))

    return jax.lax.cond(needed, add, lambda: total), None

  # each device has its own sum, and they are added once, after the last chunk;
  # unused, and so never computed, where the head is frozen
  zeros = by_device(jnp.zeros((devices, *head.shape), head.dtype))
  sums, _ = jax.lax.scan(chunk, zeros, (hidden, tokens, by_logps, needed))
  return (by_logps[..., None] * slopes).astype(hidden.dtype), jnp.sum(sums, axis=0), None, None


_logps_of_chunks.defvjp(_forward, _backward)


def _logits(
  x: Float[Array, "B Tc D"], head: Float[Array, "Vp D"], vocabulary: int
) -> Float[Array, "B Tc Vp"]:
  logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
  if vocabulary == len(head):
    return logits
  return jnp.where(jnp.arange(len(head)) < vocabulary, logits, MASKED)


def _logps(
  logits: Float[Array, "B Tc Vp"], token: Int32[Array, "B Tc"]
) -> tuple[Float[Array, "B Tc"], Float[Array, "B Tc Vp"]]:
  """Log-probabilities of the tokens and their slope by the logits."""
  picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  is_token = token[..., None] == jnp.arange(logits.shape[-1])
  return picked - normalizer, is_token - jnp.exp(logits - normalizer[..., None])


def _map_needed(
  function: Callable[[Any], Any], needed: Bool[Array, "C"], xs: tuple[Array, ...]
) -> Any:
  """`function` of each element of `xs` in turn; zeros for those that are not needed."""
  like = jax.eval_shape(lambda xs: function(jax.tree.map(lambda x: x[0], xs)), xs)

  def zeros() -> object:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

  def element(x: tuple[Array, tuple[Array, ...]]) -> Any:
    return jax.lax.cond(x[0], lambda: function(x[1]), zeros)

  return jax.lax.map(element, (needed, xs))


def cross_entropy(
  hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int32[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Next-token cross-entropy as (sum, number of labelled tokens).

  Position t predicts labels[t + 1]; labels of IGNORE_INDEX do not count. The reference (xtuner,
  HF loss) divides the sum by the count over the batch.
  """
  targets = labels[:, 1:]
  counted = targets != IGNORE_INDEX
  logps = token_logps(hidden[:, :-1], head, jnp.where(counted, targets, 0), counted)
  return -jnp.sum(logps), jnp.sum(counted).astype(jnp.float32)
