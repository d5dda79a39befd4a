"""Attention of G completions that share one prompt, whose keys and values are there once.

A completion's query looks at the prompt's tokens and, causally, at its own: two blocks of scores
under one softmax. In decoding both blocks come from caches; in a packed sequence, the prompt and
its completions one after the other, they are parts of the same keys.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int32

from vrt_jax.ops.attention import MAX_UNCHUNKED, QUERY_CHUNK, attention
from vrt_jax.ops.attention_mask import MASKED, AttentionMask
from vrt_jax.ops.flash import flash_knows, packed_flash
from vrt_jax.ops.sharding import on_tpu
from vrt_jax.ops.splash import packed_splash


class PackedMask(struct.PyTreeNode):
  """Who may look at whom in sequences of P prompt slots and then G runs of N completion slots.

  A prompt slot looks at earlier ones, slot i of a run at the prompt and at slots 0 .. i of its run.
  """

  prompt_mask: Bool[Array, "B P"]
  """True where the prompt has a token; padding comes last."""
  group_size: int = struct.field(pytree_node=False)


def packed_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  mask: PackedMask,
  *,
  kernel: bool | None = None,
) -> Float[Array, "B T N H"]:
  """softmax(q k^T / sqrt(H)) v in packed sequences, T = P + G * run; rows of padding are finite.

  `kernel` says whether the TPU kernel computes it; None: for long sequences on TPUs.
  """
  b, t, n, h = q.shape
  prompt, groups = mask.prompt_mask.shape[1], mask.group_size
  if on_tpu() and t > MAX_UNCHUNKED if kernel is None else kernel:
    return packed_splash(q, k, v, mask.prompt_mask, groups, interpret=not on_tpu())
  if flash_knows(q):
    return packed_flash(q, k, v, mask.prompt_mask, groups)

  def runs(x: Array) -> Array:
    return x[:, prompt:].reshape(b, groups, -1, *x.shape[2:])

  segments = mask.prompt_mask.astype(jnp.int32)
  first, first_k, first_v = (x[:, :prompt] for x in (q, k, v))
  out = attention(first, first_k, first_v, AttentionMask.causal(segments, segments))
  slots = jnp.arange((t - prompt) // groups)
  rest = group_attention(runs(q), first_k, first_v, mask.prompt_mask, runs(k), runs(v), slots)
  return jnp.concatenate([out, rest.reshape(b, -1, n, h)], axis=1)


def group_attention(
  q: Float[Array, "B G T N H"],
  prompt_k: Float[Array, "B P K H"],
  prompt_v: Float[Array, "B P K H"],
  prompt_mask: Bool[Array, "B P"],
  k: Float[Array, "B G S K H"],
  v: Float[Array, "B G S K H"],
  q_slots: Int32[Array, "T"],
) -> Float[Array, "B G T N H"]:
  """Each query looks at its prompt's tokens and at its completion's slots 0 .. q_slots[i].

  Scores and softmax are float32; where there are many, queries go in chunks, which the backward
  pass computes again.
  """
  b, g, t, n, h = q.shape
  scores = g * t * (prompt_k.shape[1] + k.shape[2])  # of a head
  q = q.reshape(b, g, t, k.shape[3], n // k.shape[3], h)

  def attend(q: Array, slots: Array) -> Array:
    return _attend(q, prompt_k, prompt_v, prompt_mask, k, v, slots)

  chunk = max(1, QUERY_CHUNK // g)
  if t <= chunk or scores <= MAX_UNCHUNKED**2:
    return attend(q, q_slots).reshape(b, g, t, n, h)
  chunks = -(-t // chunk)
  pad = chunks * chunk - t
  q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), *[(0, 0)] * 3))
  q = jnp.moveaxis(q.reshape(b, g, chunks, chunk, *q.shape[3:]), 2, 0)
  slots = jnp.pad(q_slots, (0, pad)).reshape(chunks, chunk)
  out = jax.lax.map(jax.checkpoint(lambda xs: attend(*xs)), (q, slots))  # [chunks, B, G, Tc, ..]
  return jnp.moveaxis(out, 0, 2).reshape(b, g, chunks * chunk, n, h)[:, :, :t]


def _attend(
  q: Array, prompt_k: Array, prompt_v: Array, prompt_mask: Array, k: Array, v: Array, slots: Array
) -> Array:
  """q [B, G, T, K, J, H], J queries a key head -> the same shape."""
  scale = q.shape[-1] ** -0.5

  shared = _product("bgtkjh,bpkh->bkgtjp", q, prompt_k) * scale
  shared = jnp.where(prompt_mask[:, None, None, None, None], shared, MASKED)
  own = _product("bgtkjh,bgskh->bgktjs", q, k) * scale
  allowed = jnp.arange(k.shape[2]) <= slots[:, None]  # [T, S]
  own = jnp.where(allowed[:, None], own, MASKED)
  shared, own, total = _weights(shared, own)
  out = _product("bkgtjp,bpkh->bgtkjh", shared.astype(v.dtype), prompt_v)
  out = out + _product("bgktjs,bgskh->bgtkjh", own.astype(v.dtype), v)
  return (out / jnp.moveaxis(total, 2, 3)[..., None]).astype(v.dtype)


def step_attention(
  q: Float[Array, "B G N H"],
  prompt_k: Float[Array, "B K H P"],
  prompt_v: Float[Array, "B K H P"],
  prompt_mask: Bool[Array, "B P"],
  k: Float[Array, "BGK H S"],
  v: Float[Array, "BGK H S"],
  slot: ArrayLike,
) -> Float[Array, "B G N H"]:
  """`group_attention` of one query a sample, of slot `slot`, to keys whose slots lie side by side.

  CPUs multiply matrices in this order; from the other one they would copy at every token. k and v
  may be wider than q; weights are rounded to its dtype all the same, as `group_attention` does.
  """
  b, g, _, h = q.shape
  queries = q.reshape(b, g, prompt_k.shape[1], -1, h)

  shared = _product("bgkjh,bkhp->bkgjp", queries, prompt_k) * h**-0.5
  shared = jnp.where(prompt_mask[:, None, None, None], shared, MASKED)
  own = _product("njh,nhs->njs", queries.reshape(len(k), -1, h).astype(k.dtype), k) * h**-0.5
  own = jnp.where(jnp.arange(k.shape[-1]) <= slot, own, MASKED)
  shared, own, total = _weights(shared, own.reshape(*queries.shape[:4], -1))
  out = _product("bkgjp,bkhp->bgkjh", shared.astype(q.dtype), prompt_v)
  own = own.reshape(len(k), -1, k.shape[-1]).astype(q.dtype).astype(v.dtype)
  out = out + _product("njs,nhs->njh", own, v).reshape(out.shape)
  return (out / total[..., None]).astype(q.dtype).reshape(q.shape)


def _product(form: str, x: Array, y: Array) -> Array:
  """float32 sums of products in the dtype of x."""
  return jnp.einsum(form, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _weights(
  shared: Float[Array, "B K G *R P"], own: Float[Array, "B G K *R S"]
) -> tuple[Float[Array, "B K G *R P"], Float[Array, "B G K *R S"], Float[Array, "B G K *R"]]:
  """Scores of two blocks -> the weights of one softmax over both, and their sum, to divide by."""
  own_max = jnp.moveaxis(own.max(-1, keepdims=True), 1, 2)
  largest = jax.lax.stop_gradient(jnp.maximum(shared.max(-1, keepdims=True), own_max))
  shared = jnp.exp(shared - largest)
  own = jnp.exp(own - jnp.moveaxis(largest, 2, 1))
  return shared, own, jnp.moveaxis(shared.sum(-1), 1, 2) + own.sum(-1)
