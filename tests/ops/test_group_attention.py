"""Groups that share a prompt against each completion alone behind its own copy of the prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.ops import group_attention as module
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.group_attention import (
  PackedMask,
  group_attention,
  packed_attention,
  step_attention,
)

B, G, P, N = 2, 3, 13, 21
LENGTHS = (13, 9)
PROMPT_MASK = jnp.arange(P) < jnp.asarray(LENGTHS)[:, None]


def arrays(h: int = 8) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, P + G * N, n, h)), jnp.float32) for n in (4, 2, 2)]


def one_by_one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Every completion in a sequence of its own, [B, P + N] by `attention`."""
  segments = jnp.concatenate([PROMPT_MASK, jnp.ones((B, N), bool)], axis=1).astype(jnp.int32)
  mask = AttentionMask.causal(segments, segments)

  def run(x: jax.Array, g: int) -> jax.Array:
    return jnp.concatenate([x[:, :P], x[:, P + g * N : P + (g + 1) * N]], axis=1)

  outs = [attention(run(q, g), run(k, g), run(v, g), mask) for g in range(G)]
  return jnp.concatenate([outs[0][:, :P], *[o[:, P:] for o in outs]], axis=1)


def rows_that_count() -> np.ndarray:
  return np.asarray(jnp.pad(PROMPT_MASK, ((0, 0), (0, G * N)), constant_values=True))


@pytest.mark.parametrize(
  ("query_chunk", "unchunked", "at_a_time"), [(256, 0, N), (24, 1024, N), (24, 0, 24 // G)]
)
def test_packed_equals_one_by_one(
  monkeypatch: pytest.MonkeyPatch, query_chunk: int, unchunked: int, at_a_time: int
):
  """In one piece, where chunks or few scores allow it, and in chunks that do not divide N."""
  monkeypatch.setattr(module, "QUERY_CHUNK", query_chunk)
  monkeypatch.setattr(module, "MAX_UNCHUNKED", unchunked)
  sizes, attend = set(), module._attend
  monkeypatch.setattr(module, "_attend", lambda q, *x: sizes.add(q.shape[2]) or attend(q, *x))
  mask = PackedMask(PROMPT_MASK, G)
  rows = rows_that_count()
  found = packed_attention(*arrays(), mask)
  wanted = one_by_one(*arrays())
  assert sizes == {at_a_time}
  np.testing.assert_allclose(found[rows], wanted[rows], rtol=1e-5, atol=1e-5)
  everything = packed_attention(*arrays(), PackedMask(jnp.ones_like(PROMPT_MASK), G))
  assert np.abs(np.asarray(everything - wanted))[1, P:].max() > 0.05  # padding must not be seen
  weights = jnp.asarray(rows[..., None, None], jnp.float32)

  def loss(run):
    return lambda *x: jnp.sum(jnp.sin(run(*x)) * weights)

  grads = jax.grad(loss(lambda *x: packed_attention(*x, mask)), (0, 1, 2))(*arrays())
  for a, b in zip(grads, jax.grad(loss(one_by_one), (0, 1, 2))(*arrays()), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_kernel_equals_the_chunks():
  """The TPU kernel, interpreted, with its gradients."""
  mask, rows = PackedMask(PROMPT_MASK, G), rows_that_count()
  weights = jnp.asarray(rows[..., None, None], jnp.float32)

  def run(kernel: bool) -> tuple[jax.Array, list[jax.Array]]:
    def loss(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
      out = packed_attention(*x, mask, kernel=kernel)
      return jnp.sum(jnp.sin(out) * weights), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays(64))
    return out[rows], grads

  (found, grads), (wanted, wanted_grads) = run(True), run(False)
  np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
  for a, b in zip(grads, wanted_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_query_sees_its_slot_and_those_before():
  q, k, v = arrays()
  runs = [x[:, P:].reshape(B, G, N, *x.shape[2:]) for x in (q, k, v)]
  whole = group_attention(runs[0], k[:, :P], v[:, :P], PROMPT_MASK, *runs[1:], jnp.arange(N))
  late = jnp.asarray([7])
  one = group_attention(runs[0][:, :, 7:8], k[:, :P], v[:, :P], PROMPT_MASK, *runs[1:], late)
  np.testing.assert_allclose(one, whole[:, :, 7:8], rtol=1e-5, atol=1e-6)
  other = group_attention(runs[0][:, :, 7:8], k[:, :P], v[:, :P], PROMPT_MASK, *runs[1:], late + 1)
  assert np.abs(other - one).max() > 1e-3


def test_large_scores_of_one_block_leave_the_other_without_overflow():
  q, k, v = arrays()
  big = jnp.concatenate([40.0 * k[:, :P], k[:, P:]], axis=1)
  found = packed_attention(q, big, v, PackedMask(PROMPT_MASK, G))
  rows = rows_that_count()
  np.testing.assert_allclose(found[rows], one_by_one(q, big, v)[rows], rtol=1e-4, atol=1e-4)


def slots_last(x: jax.Array) -> jax.Array:
  return jnp.moveaxis(x, -3, -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_equals_a_group_of_one_query(dtype: jnp.dtype):
  """With keys in the order of CPUs; slots after the query's hold numbers that must not count."""
  q, k, v = (x.astype(dtype) for x in arrays())
  (prompt_k, own_k), (prompt_v, own_v) = (
    (x[:, :P], x[:, P:].reshape(B, G, N, *x.shape[2:])) for x in (k, v)
  )
  queries = q[:, P:].reshape(B, G, N, *q.shape[2:])
  own = [slots_last(x).reshape(-1, x.shape[-1], N) for x in (own_k, own_v)]
  prompt = [slots_last(x) for x in (prompt_k, prompt_v)]
  for slot in (0, 7, N - 1):
    found = step_attention(queries[:, :, slot], *prompt, PROMPT_MASK, *own, jnp.int32(slot))
    wanted = group_attention(
      queries[:, :, slot, None], prompt_k, prompt_v, PROMPT_MASK, own_k, own_v, jnp.array([slot])
    )[:, :, 0]
    assert found.dtype == dtype
    a, b = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(a, b, atol=1e-5 if dtype == jnp.float32 else 2e-2)
  first, last = (
    step_attention(queries[:, :, 0], *prompt, PROMPT_MASK, *own, jnp.int32(slot))
    for slot in (0, N - 1)
  )
  assert np.abs(np.asarray(first - last, np.float32)).max() > 0.05
