"""Greedy choice, temperature and top-p on literal probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.generate import sampling as module
from vrt_jax.generate.sampling import (
  DRAW_BLOCK,
  Sampling,
  draw,
  logp_and_entropy,
  nucleus,
  sample,
)

PROBS = np.array([0.05, 0.5, 0.15, 0.3], np.float32)
NONE = jnp.zeros(4, bool)


def keys(rows: int, seed: int = 0) -> jax.Array:
  return jax.random.split(jax.random.key(seed), rows)


def frequencies(
  sampling: Sampling, forbidden: jax.Array = NONE, probs: np.ndarray = PROBS
) -> np.ndarray:
  rows = jnp.tile(jnp.log(jnp.asarray(probs)), (4000, 1))
  tokens = sample(keys(4000), rows, sampling, forbidden)
  assert tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=4) / 4000


@pytest.mark.parametrize("size", [4, 512, 1300])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_log_probability_and_entropy(monkeypatch: pytest.MonkeyPatch, size: int, platform: str):
  monkeypatch.setattr(module, "platform", lambda: platform)
  logits = np.random.default_rng(1).normal(40, 9, (2, 3, size)).astype(np.float32)
  tokens = np.array([[0, 1, 2], [size - 1, size - 2, size - 3]], np.int32)
  exact = logits.astype(np.float64) - 40
  probs = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
  logp, entropy = logp_and_entropy(jnp.asarray(logits), jnp.asarray(tokens))
  wanted = np.log(np.take_along_axis(probs, tokens[..., None], -1)[..., 0])
  np.testing.assert_allclose(logp, wanted, atol=1e-4)
  np.testing.assert_allclose(entropy, -(probs * np.log(probs)).sum(-1), atol=1e-5)


def test_greedy_takes_the_best_allowed_token():
  logits = jnp.asarray([[0.1, 3.0, 2.0, -1.0], [5.0, 0.0, 0.0, 0.0]])
  assert sample(keys(2), logits, Sampling(), NONE).tolist() == [1, 0]
  assert sample(keys(2), logits, Sampling(), NONE.at[1].set(True)).tolist() == [2, 0]


def test_temperature_one_draws_from_the_distribution():
  np.testing.assert_allclose(frequencies(Sampling(1.0)), PROBS, atol=0.03)


def test_temperature_flattens():
  flat = np.sqrt(PROBS) / np.sqrt(PROBS).sum()
  np.testing.assert_allclose(frequencies(Sampling(2.0)), flat, atol=0.03)


@pytest.mark.parametrize(
  ("top_p", "nucleus"),
  [
    (0.45, [1]),
    (0.7, [1, 3]),  # 0.5 is not enough, 0.5 + 0.3 is
    (0.9, [1, 2, 3]),
    (1.0, [0, 1, 2, 3]),
    (1e-6, [1]),  # the best token always stays
  ],
)
def test_top_p_keeps_the_nucleus_in_proportion(top_p: float, nucleus: list[int]):
  expected = np.zeros(4)
  expected[nucleus] = PROBS[nucleus] / PROBS[nucleus].sum()
  got = frequencies(Sampling(1.0, top_p))
  assert set(np.flatnonzero(got)) == set(nucleus)
  np.testing.assert_allclose(got, expected, atol=0.03)


@pytest.mark.parametrize("draws", [0, 1, 3])
def test_rows_whose_draws_are_not_good_draw_in_the_searched_nucleus(draws: int, monkeypatch):
  """The best of many tokens in a nucleus of few: hardly a draw is good."""
  monkeypatch.setattr(module, "DRAWS", draws)
  probs = np.array([0.2, 0.26, 0.3, 0.24], np.float32)
  got = frequencies(Sampling(1.0, 0.5), probs=probs)
  assert set(np.flatnonzero(got)) == {1, 2}
  np.testing.assert_allclose(got[1:3], [0.26 / 0.56, 0.3 / 0.56], atol=0.03)


def test_a_row_in_a_nucleus_follows_its_key_alone():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50)), jnp.float32)
  none = jnp.zeros(50, bool)
  first = sample(keys(64), rows, Sampling(1.0, 0.6), none)
  again = sample(keys(64)[8:16], rows[8:16], Sampling(1.0, 0.6), none)
  np.testing.assert_array_equal(first[8:16], again)
  assert len(set(first.tolist())) > 15


def test_temperature_comes_before_top_p():
  # square roots: 0.12, 0.38, 0.21, 0.29; the untempered nucleus of 0.7 would be [1, 3]
  assert set(np.flatnonzero(frequencies(Sampling(2.0, 0.7)))) == {1, 2, 3}


@pytest.mark.parametrize("sampling", [Sampling(5.0), Sampling(1.2, 0.9)])
def test_forbidden_tokens_are_never_drawn_and_do_not_fill_the_nucleus(sampling: Sampling):
  forbidden = NONE.at[jnp.asarray([1, 3])].set(True)
  got = frequencies(sampling, forbidden)
  assert set(np.flatnonzero(got)) == {0, 2}


def test_a_row_follows_its_key_alone():
  rows = jnp.zeros((64, 50))
  none = jnp.zeros(50, bool)
  first = sample(keys(64), rows, Sampling(1.0), none)
  assert len(set(first.tolist())) > 20
  np.testing.assert_array_equal(first[8:16], sample(keys(64)[8:16], rows[:8], Sampling(1.0), none))
  assert (first != sample(keys(64, seed=1), rows, Sampling(1.0), none)).any()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_sorted_probabilities(top_p: float):
  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=(8, 300))).astype(np.float32)
  logits[:, ::7] = -np.inf
  logits[:, 1::9] = np.round(logits[:, 1::9])  # ties
  found = np.asarray(nucleus(jnp.asarray(logits), top_p))
  probs = np.exp(logits.astype(np.float64))
  probs /= probs.sum(-1, keepdims=True)
  for row, p, kept in zip(logits, probs, found, strict=True):
    above = np.array([p[row > x].sum() for x in row])
    np.testing.assert_array_equal(kept, above < top_p)
  assert found.sum(-1).min() >= 1


@pytest.mark.parametrize("size", [3, DRAW_BLOCK, 3 * DRAW_BLOCK + 17])
def test_a_draw_inverts_the_running_sum(size: int):
  rng = np.random.default_rng(0)
  weights = rng.random((40, size), np.float32) * (rng.random((40, size)) < 0.5)
  weights[:, 0] = 0
  weights[:, -2] = 0.1
  weights[:, -1] = 0
  uniform = np.concatenate([[0.0, 1 - 2**-24], rng.random(38)]).astype(np.float32)
  got = np.asarray(draw(jnp.asarray(uniform), jnp.asarray(weights)))
  sums = np.cumsum(weights.astype(np.float64), axis=1)
  expected = np.array([np.argmax(s > u * s[-1]) for u, s in zip(uniform, sums, strict=True)])
  rows = np.arange(40)
  assert (weights[rows, got] > 0).all()  # also at both ends
  assert np.mean(got == expected) > 0.9  # others lie next to a boundary
  assert got[1] == size - 2 == expected[1]


def test_draws_from_many_tokens_follow_their_weights():
  weights = np.zeros(2 * DRAW_BLOCK, np.float32)
  weights[[5, DRAW_BLOCK - 1, DRAW_BLOCK, 2 * DRAW_BLOCK - 1]] = PROBS
  uniform = jax.random.uniform(jax.random.key(0), (4000,))
  got = draw(uniform, jnp.tile(jnp.asarray(weights), (4000, 1)))
  found = np.bincount(got, minlength=len(weights)) / 4000
  np.testing.assert_allclose(found, weights, atol=0.03)
