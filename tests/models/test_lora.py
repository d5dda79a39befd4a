"""LoRA: fresh adapters change nothing, merged adapters give the same outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from vrt_jax.models.adapters import LoraLinear, draw_dropouts
from vrt_jax.models.lora import add_lora, merge_lora
from vrt_jax.models.sa2va import Sa2VA

ADAPTED = dataclasses.replace(tiny.MODEL, lora=tiny.LORA)


def flat(model: Sa2VA) -> dict[tuple, np.ndarray]:
  return {p: np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model))}


@jax.jit
def _hidden(graphdef: nnx.GraphDef, state: nnx.State, text, vision) -> jax.Array:
  return nnx.merge(graphdef, state).qwen(text, vision)


def hidden(model: Sa2VA) -> jax.Array:
  """Hidden states of the tokens that are no padding."""
  batch = tiny.batch()
  return _hidden(*nnx.split(model), batch.text, batch.vision)[batch.text.token_mask]


@pytest.fixture(scope="module")
def adapted() -> Sa2VA:
  """A model whose adapters are all random, B too."""
  return tiny.random_model(ADAPTED)


def test_merged_linear_equals_the_unmerged_one():
  linear = LoraLinear(32, 48, lora=tiny.LORA, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  linear.lora_b[...] = jnp.asarray(rng.normal(size=(48, 2)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
  merged = linear.weight[...] + 2.0 * linear.lora_b[...] @ linear.lora_a[...]  # alpha / rank = 2
  np.testing.assert_allclose(linear(x), x @ merged.T, rtol=1e-5, atol=1e-5)


def test_merged_outputs_equal_unmerged_ones(adapted: Sa2VA):
  got, expected = hidden(merge_lora(adapted)), hidden(adapted)
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(got / scale, expected / scale, rtol=1e-5, atol=1e-5)
  plain = {p: v for p, v in nnx.to_flat_state(nnx.state(adapted)) if "lora" not in p[-1]}
  graphdef = nnx.graphdef(tiny.loaded().model)
  without = hidden(nnx.merge(graphdef, nnx.from_flat_state(plain)))
  assert float(jnp.abs(without - expected).max()) > 0.1 * scale


def test_merge_is_w_plus_scaled_b_a_and_touches_nothing_else(adapted: Sa2VA):
  before, after = flat(adapted), flat(merge_lora(adapted))
  assert set(before) - set(after) == {p for p in before if p[-1] in ("lora_a", "lora_b")}
  changed = {p for p in after if not np.array_equal(after[p], before[p])}
  linears = {p[:-1] for p in before if p[-1] == "lora_a"}
  assert changed == {(*p, "weight") for p in linears}
  names = {p[-1] for p in linears}
  assert names == {
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
  }
  for p in linears:
    a, b, w = (before[(*p, name)] for name in ("lora_a", "lora_b", "weight"))
    for layer in range(2):
      expected = w[layer] + (4.0 / 2) * (b[layer] @ a[layer])  # alpha / rank = 2
      np.testing.assert_allclose(after[(*p, "weight")][layer], expected, rtol=1e-5, atol=1e-6)
  for path, value in flat(adapted).items():  # the given model is as it was
    np.testing.assert_array_equal(value, before[path])


def test_a_model_without_adapters_is_returned_itself():
  model = tiny.loaded().model
  assert merge_lora(model) is model


def test_fresh_adapters_leave_the_outputs_alone():
  base = tiny.loaded().model
  model = add_lora(base, tiny.LORA, seed=0)
  assert model.config == ADAPTED
  values = flat(model)
  for path, value in flat(base).items():
    np.testing.assert_array_equal(values[path], value)
  for path, value in values.items():
    if path[-1] == "lora_b":
      assert not value.any()
    if path[-1] == "lora_a":
      bound = value.shape[-1] ** -0.5
      assert 0.5 * bound < np.abs(value).max() <= bound
  fresh = [path for path in values if path[-1] == "lora_a"]
  assert len(fresh) == 7
  assert not np.array_equal(*(values[p].ravel()[:64] for p in fresh[:2]))
  assert not np.array_equal(values[fresh[0]][0], values[fresh[0]][1])
  other = flat(add_lora(base, tiny.LORA, seed=1))
  assert not np.array_equal(other[fresh[0]], values[fresh[0]])
  merged = flat(merge_lora(model))
  for path, value in flat(base).items():
    np.testing.assert_array_equal(merged[path], value)


def test_adapter_dropout_is_on_in_training_only():
  config = dataclasses.replace(tiny.LORA, dropout=0.5)
  model = tiny.random_model(dataclasses.replace(tiny.MODEL, lora=config))
  layer = model.qwen.language_model.layers
  weights = {name: getattr(layer.self_attn.q_proj, name)[0] for name in ("lora_a", "lora_b")}
  linear = LoraLinear(32, 32, lora=config, rngs=nnx.Rngs(0))
  linear.lora_a[...], linear.lora_b[...] = weights["lora_a"], weights["lora_b"]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)), jnp.float32)
  plain = np.asarray(linear(x))
  np.testing.assert_array_equal(linear(x), plain)
  dropouts = [draw_dropouts(jax.random.key(i), x.shape, 0.5, 1)[0] for i in range(400)]
  drawn = [np.asarray(linear(x, dropout)) for dropout in dropouts]
  assert np.abs(drawn[0] - plain).max() > 0.01
  np.testing.assert_allclose(np.mean(drawn, axis=0), plain, atol=0.5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_dropouts_of_one_draw_are_independent_and_unbiased(count):
  rate, shape = 0.05, (64, 64, 64)
  dropouts = draw_dropouts(jax.random.key(3), shape, rate, count)
  assert len(dropouts) == count
  masks = np.stack([np.asarray(d.keep) for d in dropouts])
  deviation = (rate * (1 - rate) / masks[0].size) ** 0.5
  for mask, dropout in zip(masks, dropouts, strict=True):
    assert abs(dropout.keep_share - (1 - rate)) < 2.0**-10
    assert abs(mask.mean() - dropout.keep_share) < 4 * deviation
    ones = np.asarray(dropout(jnp.ones(shape)))
    np.testing.assert_array_equal(ones, np.where(mask, np.float32(1 / dropout.keep_share), 0))
  for i in range(count):
    for j in range(i):
      both = (~masks[i] & ~masks[j]).mean()
      assert abs(both - rate**2) < 4 * rate / masks[0].size ** 0.5
  # the same key gives the same masks, another key others
  again = draw_dropouts(jax.random.key(3), shape, rate, count)
  np.testing.assert_array_equal(again[0].keep, dropouts[0].keep)
  assert not np.array_equal(draw_dropouts(jax.random.key(4), shape, rate, count)[0].keep, masks[0])
