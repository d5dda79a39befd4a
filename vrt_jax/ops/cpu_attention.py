"""Attention on CPUs: heads first, so that scores are written once, in the order of the products.

Long sequences go head by head in chunks of queries whose scores fit the processor's cache.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from vrt_jax.ops.attention_mask import MASKED, AttentionMask

QUERY_CHUNK = 256
MIN_BY_HEAD = 2**18
"""Scores of a head from which heads are computed one after the other."""
CAUSAL_SPANS = 4


def cpu_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: AttentionMask | None,
) -> Float[Array, "B T N H"]:
  """softmax(q k^T / sqrt(H)) v; long causal queries in spans, each against the keys up to its end.

  Gradients compute scores again.
  """
  t, s = q.shape[1], k.shape[1]
  if is_short(t, s):
    return jax.checkpoint(all_heads)(q, k, v, mask)
  if mask is None or not mask.from_start or t != s:
    return _head_by_head(q, k, v, mask)
  span = -(-t // (CAUSAL_SPANS * QUERY_CHUNK)) * QUERY_CHUNK
  parts = []
  for start in range(0, t, span):
    end = min(start + span, t)
    part = mask.chunk(start, end - start).replace(kv_segments=mask.kv_segments[:, :end])
    parts.append(_head_by_head(q[:, start:end], k[:, :end], v[:, :end], part))
  return jnp.concatenate(parts, axis=1)


def is_short(t: int, s: int) -> bool:
  """Whether all heads' scores of T queries and S keys are computed at once."""
  return t * s < MIN_BY_HEAD


def all_heads(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: AttentionMask | None,
) -> Float[Array, "B T N H"]:
  """`cpu_attention` of a short sequence, whose scores are kept for its gradients."""
  b, t, n, h = q.shape
  num_kv = k.shape[2]
  q = q.reshape(b, t, num_kv, n // num_kv, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
  allowed = None if mask is None else mask.dense()
  out = _attend(q.reshape(b, num_kv, -1, h), k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), allowed, t)
  return out.reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _head_by_head(q: Array, k: Array, v: Array, mask: AttentionMask | None) -> Array:
  b, t, n, h = q.shape
  s, num_kv = k.shape[1:3]
  groups, chunks = n // num_kv, -(-t // QUERY_CHUNK)
  pad = chunks * QUERY_CHUNK - t
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  q = q.reshape(b, chunks, QUERY_CHUNK, num_kv, groups, h).transpose(0, 3, 1, 4, 2, 5)
  q = q.reshape(b * num_kv * chunks, groups * QUERY_CHUNK, h)
  k = k.transpose(0, 2, 3, 1).reshape(b * num_kv, h, s)
  v = v.transpose(0, 2, 1, 3).reshape(b * num_kv, s, h)
  mask = None if mask is None else mask.padded(pad)

  @jax.checkpoint
  def chunk(index: Array, q: Array) -> Array:
    head, number = index // chunks, index % chunks
    allowed = None
    if mask is not None:
      allowed = mask.row(head // num_kv).chunk(number * QUERY_CHUNK, QUERY_CHUNK).dense()[0, 0]
    return _attend(q, k[head], v[head], allowed, QUERY_CHUNK)

  out = jax.lax.map(lambda xs: chunk(*xs), (jnp.arange(len(q)), q))
  out = out.reshape(b, num_kv, chunks, groups, QUERY_CHUNK, h).transpose(0, 2, 4, 1, 3, 5)
  return out.reshape(b, chunks * QUERY_CHUNK, n, h)[:, :t]


def _attend(
  q: Float[Array, "*X GT H"],
  k: Float[Array, "*X H S"],
  v: Float[Array, "*X S H"],
  allowed: Bool[Array, "*Y 1 T S"] | None,
  t: int,
) -> Float[Array, "*X GT H"]:
  """For the queries of G heads; `allowed` is the same for all of them."""
  scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
  if allowed is not None:
    by_head = scores.reshape(*q.shape[:-2], -1, t, k.shape[-1])
    scores = jnp.where(allowed, by_head, MASKED).reshape(scores.shape)
  largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  terms = jnp.exp((scores - largest) * q.shape[-1] ** -0.5)
  out = jnp.matmul(terms.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (out / jnp.sum(terms, axis=-1, keepdims=True)).astype(v.dtype)
