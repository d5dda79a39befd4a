"""The TPU kernel, interpreted on the CPU, against chunked attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.splash import block_of, kernel_length, splash


def arrays(t: int, s: int, h: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  shapes = [(1, t, 2, h), (1, s, 1, h), (1, s, 1, h)]
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def test_blocks_divide():
  assert [block_of(n) for n in (128, 2560, 6272, 4096)] == [128, 640, 896, 1024]
  assert [block_of(n, 512) for n in (128, 2560, 6144)] == [128, 512, 512]
  assert [kernel_length(n, 512) for n in (5920, 6272)] == [6144, 6656]


def test_padded_lengths_have_large_blocks():
  lengths = (100, 1824, 2560, 6272, 4096, 5920)
  assert [kernel_length(n) for n in lengths] == [128, 1920, 2560, 6272, 4096, 6144]


@pytest.mark.parametrize(("t", "s", "causal"), [(200, 300, True), (256, 256, False)])
def test_equals_attention(t, s, causal):
  """Lengths that are padded, grouped heads, two segments, and padding at the end."""
  q, k, v = arrays(t, s, 64)
  q_segments = jnp.asarray([[1] * 100 + [2] * (t - 110) + [0] * 10])
  kv_segments = jnp.asarray([[1] * 100 + [2] * (s - 110) + [0] * 10])
  kind = AttentionMask.causal if causal else AttentionMask
  wanted = attention(q, k, v, kind(q_segments, kv_segments))
  found = splash(q, k, v, q_segments, kv_segments, causal, interpret=True)
  rows = np.asarray(q_segments) > 0
  np.testing.assert_allclose(found[rows], wanted[rows], rtol=2e-5, atol=2e-5)
  other = splash(q, k, v, q_segments, kv_segments, not causal, interpret=True)
  assert np.abs(np.asarray(other - wanted))[rows].max() > 0.1


def test_without_a_mask():
  q, k, v = arrays(128, 200, 64)
  found = splash(q, k, v, None, None, False, interpret=True)
  np.testing.assert_allclose(found, attention(q, k, v), rtol=2e-5, atol=2e-5)


def test_gradients():
  q, k, v = arrays(128, 128, 64)
  segments = jnp.asarray([[1] * 60 + [2] * 68])

  def loss(run):
    return lambda *x: jnp.sum(jnp.sin(run(*x)))

  mask = AttentionMask.causal(segments, segments)
  wanted = jax.grad(loss(lambda *x: attention(*x, mask)), (0, 1, 2))(q, k, v)
  kernel = loss(lambda *x: splash(*x, segments, segments, True, interpret=True))
  found = jax.grad(kernel, (0, 1, 2))(q, k, v)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
