"""Scaled dot-product attention with grouped heads that never holds a [T, S] score matrix.

On TPUs long sequences go through the splash kernel, on GPUs through cuDNN's (`ops.flash`), on a CPU
as `vrt_jax.ops.cpu_attention` says. Elsewhere queries are processed in chunks against all keys; a
chunk's scores are recomputed in the backward pass, so memory grows with chunk * S.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vrt_jax.ops.attention_mask import MASKED, AttentionMask
from vrt_jax.ops.cpu_attention import all_heads, cpu_attention, is_short
from vrt_jax.ops.flash import flash, flash_knows
from vrt_jax.ops.sharding import on_one_cpu, on_tpu, platform
from vrt_jax.ops.splash import splash

MAX_UNCHUNKED = 1024
QUERY_CHUNK = 256


def _attend(q: Array, k: Array, v: Array, mask: AttentionMask | None, scale: float) -> Array:
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
  if mask is not None:
    scores = jnp.where(mask.dense(), scores, MASKED)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", probs, v)


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: AttentionMask | None = None,
) -> Float[Array, "B T N H"]:
  """softmax(q k^T / sqrt(H)) v, N a multiple of K; scores and softmax in float32."""
  t = q.shape[1]
  if on_one_cpu():
    return cpu_attention(q, k, v, mask)
  if platform() == "cpu" and is_short(t, k.shape[1]):
    return all_heads(q, k, v, mask)
  if t > MAX_UNCHUNKED and on_tpu() and (mask is None or mask.q_slots is None or mask.from_start):
    if mask is None:
      return splash(q, k, v, None, None, causal=False)
    return splash(q, k, v, mask.q_segments, mask.kv_segments, mask.from_start)
  if flash_knows(q):
    return flash(q, k, v, mask, lambda q, k, v: in_chunks(q, k, v, mask))
  return in_chunks(q, k, v, mask)


def in_chunks(q: Array, k: Array, v: Array, mask: AttentionMask | None) -> Array:
  """`attention` in JAX's own operations, on any platform."""
  b, t, n, h = q.shape
  num_kv, scale = k.shape[2], h**-0.5
  q = q.reshape(b, t, num_kv, n // num_kv, h)
  if t <= MAX_UNCHUNKED:
    return _attend(q, k, v, mask, scale).reshape(b, t, n, h)
  num_chunks = -(-t // QUERY_CHUNK)
  pad = num_chunks * QUERY_CHUNK - t
  if pad:
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))
    mask = None if mask is None else mask.padded(pad)

  @jax.checkpoint
  def chunk(start: Array) -> Array:
    q_chunk = jax.lax.dynamic_slice_in_dim(q, start, QUERY_CHUNK, axis=1)
    mask_chunk = None if mask is None else mask.chunk(start, QUERY_CHUNK)
    return _attend(q_chunk, k, v, mask_chunk, scale)

  out = jax.lax.map(chunk, jnp.arange(num_chunks) * QUERY_CHUNK)  # [chunks, B, Tc, K, G, H]
  out = jnp.moveaxis(out, 0, 1).reshape(b, num_chunks * QUERY_CHUNK, n, h)
  return out[:, :t]
