"""Token log-probabilities and cross-entropy against the full softmax."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.train import processes
from vrt_jax.losses import token
from vrt_jax.losses.token import cross_entropy, token_logps
from vrt_jax.types import IGNORE_INDEX


@pytest.fixture(scope="module")
def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(2, 13, 6)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(11, 6)), jnp.float32)
  return hidden, head, jnp.asarray(rng.integers(0, 11, (2, 13)), jnp.int32)


def full_logps(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> jax.Array:
  logps = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head), axis=-1)
  return jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]


def every(tokens: jax.Array) -> jax.Array:
  return jnp.ones(tokens.shape, bool)


@pytest.mark.parametrize("logit_bytes", [1, 4 * 11 * 9, 2**26])
def test_values_and_gradients_equal_the_full_softmax_at_any_chunk_size(
  arrays, logit_bytes: int, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(token, "LOGIT_BYTES", logit_bytes)  # chunks of 8 (padded), 9 and all 26 rows
  hidden, head, tokens = arrays
  weights = jnp.asarray(np.random.default_rng(1).normal(size=tokens.shape), jnp.float32)
  counted = every(tokens).at[0, 3:].set(False).at[1, 7].set(False)
  got = token_logps(hidden, head, tokens, counted)
  expected = jnp.where(counted, full_logps(hidden, head, tokens), 0)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  assert got.dtype == jnp.float32

  def full(hidden, head, tokens, counted):
    return jnp.where(counted, full_logps(hidden, head, tokens), 0)

  def weighted(function):
    return jax.grad(lambda h, w: jnp.sum(function(h, w, tokens, counted) * weights), argnums=(0, 1))

  for a, b in zip(weighted(token_logps)(hidden, head), weighted(full)(hidden, head), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_chunk_in_which_nothing_counts_is_not_computed(arrays, monkeypatch: pytest.MonkeyPatch):
  """Its states are not numbers, which any product would pass on."""
  monkeypatch.setattr(token, "LOGIT_BYTES", 1)  # positions 0..6 and 7..12
  hidden, head, tokens = arrays
  counted = every(tokens).at[:, :7].set(False)

  def total(hidden, head):
    return jnp.sum(token_logps(hidden, head, tokens, counted))

  bad = hidden.at[:, :7].set(jnp.nan)
  value, grads = jax.value_and_grad(total, argnums=(0, 1))(bad, head)
  expected, whole = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
  np.testing.assert_array_equal(value, expected)
  jax.tree.map(np.testing.assert_array_equal, grads, whole)
  assert np.isnan(total(hidden.at[:, 7].set(jnp.nan), head))


def test_a_frozen_head_needs_the_logits_once(arrays):
  hidden, head, tokens = arrays

  def products(argnums) -> int:
    def total(hidden, head):
      return jnp.sum(token_logps(hidden, head, tokens, every(tokens)))

    step = jax.jit(jax.grad(total, argnums=argnums))
    return step.lower(hidden, head).compile().as_text().count(" dot(")

  assert products((0,)) == 2 < products((0, 1))


def test_a_trained_head_is_summed_over_devices_once(tmp_path: Path):
  """Not in every chunk, which would send its gradient as often as there are chunks."""
  found = processes.found_by("tests.losses.head_on_mesh", tmp_path / "found.json")
  for error, in_loops, outside in found.values():
    assert error < 1e-5
    assert (in_loops, outside) == (0, 1)


def test_logits_are_float32_for_bfloat16_states(arrays):
  hidden, head, tokens = arrays
  got = token_logps(hidden.astype(jnp.bfloat16), head, tokens, every(tokens))
  rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, full_logps(*rounded, tokens), rtol=1e-4, atol=1e-4)


def test_cross_entropy_shifts_by_one_and_skips_ignored_labels(arrays):
  hidden, head, labels = arrays
  labels = labels.at[0, :5].set(IGNORE_INDEX).at[1, 9:].set(IGNORE_INDEX)
  total, count = cross_entropy(hidden, head, labels)
  logits = torch.tensor(np.asarray(jnp.einsum("btd,vd->btv", hidden, head)))
  shifted = torch.tensor(np.asarray(labels)[:, 1:]).long()
  expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), shifted.reshape(-1), reduction="sum")
  assert float(count) == (13 - 5) + (9 - 1)  # row 0 keeps positions 5.., row 1 loses label 0
  np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
  unshifted = F.cross_entropy(
    logits.reshape(-1, 11), torch.tensor(np.asarray(labels)).long().reshape(-1), reduction="sum"
  )
  assert abs(float(total) - unshifted.item()) > 0.1


def test_a_batch_without_labels_is_zero_and_differentiable(arrays):
  hidden, head, tokens = arrays
  labels = jnp.full_like(tokens, IGNORE_INDEX)
  total, count = cross_entropy(hidden, head, labels)
  assert (float(total), float(count)) == (0.0, 0.0)
  grads = jax.grad(lambda h: cross_entropy(h, head, labels)[0])(hidden)
  assert np.isfinite(grads).all()
  assert not grads.any()
