"""Attention against a plain numpy version; chunked equals unchunked, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.ops import attention as module
from vrt_jax.ops import cpu_attention, sharding
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask


def arrays(t: int = 11, s: int = 11) -> tuple[jax.Array, jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  shapes = [(2, t, 4, 8), (2, s, 2, 8), (2, s, 2, 8)]
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def masks() -> dict[str, AttentionMask | None]:
  segments = jnp.asarray([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11], jnp.int32)
  tokens = (segments > 0).astype(jnp.int32)
  return {
    "none": None,
    "segments": AttentionMask(segments, segments),
    "slots": AttentionMask(tokens, tokens, jnp.arange(11)),
    "causal": AttentionMask.causal(tokens, tokens),
  }


def plain(q, k, v, mask) -> np.ndarray:
  """Every head and query on its own, in float64."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  out = np.zeros_like(q)
  for b, t, n in np.ndindex(q.shape[:3]):
    keys = range(k.shape[1])
    if mask is not None:
      q_segment, kv_segments = mask.q_segments[b, t], mask.kv_segments[b]
      keys = [s for s in keys if kv_segments[s] == q_segment and kv_segments[s] > 0]
      if mask.q_slots is not None:
        keys = [s for s in keys if s <= mask.q_slots[t]]
    if not keys:
      continue
    scores = np.array([q[b, t, n] @ k[b, s, n // 2] for s in keys]) / np.sqrt(8)
    weights = np.exp(scores - scores.max())
    out[b, t, n] = sum(w * v[b, s, n // 2] for w, s in zip(weights, keys, strict=True))
    out[b, t, n] /= weights.sum()
  return out


@pytest.mark.parametrize("name", ["none", "segments", "slots", "causal"])
def test_equals_plain_attention(name):
  q, k, v = arrays()
  mask = masks()[name]
  rows = np.ones((2, 11), bool) if mask is None else np.asarray(mask.q_segments) > 0
  out = np.asarray(attention(q, k, v, mask))
  np.testing.assert_allclose(out[rows], plain(q, k, v, mask)[rows], rtol=1e-5, atol=1e-5)
  assert np.isfinite(out).all()


def test_query_slots_address_a_cache():
  q, k, v = arrays(t=2)
  mask = AttentionMask(jnp.ones((2, 2), jnp.int32), masks()["causal"].kv_segments, jnp.arange(4, 6))
  np.testing.assert_allclose(attention(q, k, v, mask), plain(q, k, v, mask), rtol=1e-5, atol=1e-5)


def small_value_and_grads(name):
  q, k, v = arrays()
  mask = masks()[name]
  rows = jnp.ones((2, 11)) if mask is None else (mask.q_segments > 0).astype(jnp.float32)

  def loss(q, k, v):
    out = attention(q, k, v, mask) * rows[:, :, None, None]
    return jnp.sum(jnp.sin(out)), out

  return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize("name", ["none", "segments", "slots", "causal"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_chunked_equals_unchunked(monkeypatch, name, platform):
  whole = small_value_and_grads(name)
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  monkeypatch.setattr(module, "platform", lambda: platform)
  monkeypatch.setattr(module, "MAX_UNCHUNKED", 4)
  monkeypatch.setattr(cpu_attention, "MIN_BY_HEAD", 1)
  for part in (module, cpu_attention):
    monkeypatch.setattr(part, "QUERY_CHUNK", 3)  # does not divide 11: the last chunk is padded
  monkeypatch.setattr(cpu_attention, "CAUSAL_SPANS", 2)
  chunked = small_value_and_grads(name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked)
  assert all(float(jnp.abs(g).max()) > 1e-2 for g in chunked[1])


def small_sequences_on_divided_cpus(monkeypatch, name, min_by_head):
  """Values, gradients and the number of calls of `all_heads`."""
  calls = []

  def counted(*args):
    calls.append(args)
    return cpu_attention.all_heads(*args)

  monkeypatch.setattr(sharding, "platform", lambda: "cpu")
  monkeypatch.setattr(module, "platform", lambda: "cpu")
  monkeypatch.setattr(module, "on_one_cpu", lambda: False)
  monkeypatch.setattr(module, "all_heads", counted)
  monkeypatch.setattr(cpu_attention, "MIN_BY_HEAD", min_by_head)
  return small_value_and_grads(name), len(calls)


@pytest.mark.parametrize("name", ["none", "segments", "slots", "causal"])
def test_cpus_that_a_mesh_divides_take_heads_first_for_short_sequences(monkeypatch, name):
  short, calls = small_sequences_on_divided_cpus(monkeypatch, name, 1000)
  assert calls == 1
  long, calls = small_sequences_on_divided_cpus(monkeypatch, name, 1)
  assert calls == 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), short, long)


def test_a_span_of_causal_queries_reads_no_later_keys(monkeypatch):
  sizes = []
  head_by_head = cpu_attention._head_by_head

  def counted(q, k, v, mask):
    sizes.append((q.shape[1], k.shape[1]))
    return head_by_head(q, k, v, mask)

  monkeypatch.setattr(sharding, "platform", lambda: "cpu")
  monkeypatch.setattr(cpu_attention, "_head_by_head", counted)
  args, mask, _ = long_arrays(jnp.float32)
  attention(*args, mask)
  assert sizes == [(512, 512), (512, 1024), (256, 1280)]


def test_bfloat16_output():
  q, k, v = (a.astype(jnp.bfloat16) for a in arrays())
  assert attention(q, k, v).dtype == jnp.bfloat16


def long_arrays(dtype) -> tuple[tuple[jax.Array, ...], AttentionMask, jax.Array]:
  """Queries, keys and values of 1280 slots, a causal mask, and 1.0 where a slot has a token."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 1280, n, 64)), dtype) for n in (4, 2, 2))
  tokens = (jnp.arange(1280) < jnp.asarray([[1280], [1100]])).astype(jnp.int32)
  return (q, k, v), AttentionMask.causal(tokens, tokens), tokens.astype(jnp.float32)


def value_and_grads(args, mask, rows):
  def loss(q, k, v):
    out = attention(q, k, v, mask).astype(jnp.float32) * rows[:, :, None, None]
    return jnp.sum(jnp.sin(out)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
  return out, *grads
