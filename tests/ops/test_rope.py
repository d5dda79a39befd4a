"""Rotary embeddings: axis order, relative positions and float32 angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.ops import rope
from vrt_jax.ops.rope import apply_rope, mrope_axes, mrope_cos_sin, vision_cos_sin


def test_interleaved_sections_of_the_4b_model():
  axes = mrope_axes((24, 20, 20))
  assert axes[:6].tolist() == [0, 1, 2, 0, 1, 2]
  assert np.bincount(axes).tolist() == [24, 20, 20]
  assert not axes[60:].any()  # the slowest frequencies follow time


def test_mrope_angles_by_hand():
  positions = jnp.asarray([[[2]], [[5]], [[7]]], jnp.int32)
  cos, sin = mrope_cos_sin(positions, 8, 16.0, (2, 1, 1))
  angles = np.array([2.0, 5 / 2.0, 7 / 4.0, 2 / 8.0])  # frequencies 16 ** (-i / 4)
  np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)
  np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-6)
  assert cos.dtype == jnp.float32


def test_sections_must_fill_the_head():
  with pytest.raises(ValueError, match="mrope_section"):
    mrope_cos_sin(jnp.zeros((3, 1, 1), jnp.int32), 16, 1e4, (2, 1, 1))


def test_vision_angles_by_hand():
  cos, sin = vision_cos_sin(jnp.asarray([[[3, 4]]], jnp.int32), 8)
  angles = np.array([3, 3 / 100, 4, 4 / 100])  # row first, then column
  np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)
  np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-6)


def test_rotation_turns_halves():
  x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  quarter = jnp.full((1, 1, 2), np.pi / 2)
  out = apply_rope(x, jnp.cos(quarter), jnp.sin(quarter))
  np.testing.assert_allclose(out[0, 0, 0], [-3, -4, 1, 2], atol=1e-6)


def test_scores_depend_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

  def score(q_position, k_position):
    tables = [
      mrope_cos_sin(jnp.full((3, 1, 1), p, jnp.int32), 16, 1e4, (4, 2, 2))
      for p in (q_position, k_position)
    ]
    return float(jnp.sum(apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])))

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_dtype_is_kept():
  x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  assert apply_rope(x, jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2))).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpus_turn_halves_by_a_product(monkeypatch, dtype):
  """Values and gradients; the program of a TPU has no halves."""
  x, weights = (
    jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, 3, 8)), dtype) for seed in (0, 1)
  )
  angles = jnp.linspace(0.0, 3.0, 2 * 5 * 4).reshape(2, 5, 4)

  def run() -> tuple[list[np.ndarray], str]:
    def loss(x):
      out = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
      return jnp.sum((out * weights).astype(jnp.float32)), out

    grads, out = jax.grad(loss, has_aux=True)(x)
    return [np.asarray(y, np.float32) for y in (out, grads)], str(jax.make_jaxpr(loss)(x))

  expected, program = run()
  assert "dot_general" not in program
  monkeypatch.setattr(rope, "on_tpu", lambda: True)
  found, program = run()
  assert "dot_general" in program and "split" not in program
  limit = 1e-6 if dtype == jnp.float32 else 0.02
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit)
