"""Stacks of layers, and stacks whose layers are apart."""

import dataclasses
import re
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.generate import test_decode as decoding
from vrt_jax.generate.decode import TokenIds
from vrt_jax.generate.generation import generate, write_text
from vrt_jax.generate.predictor import Predictor
from vrt_jax.models import stacks
from vrt_jax.models.stacks import Apart, layer_of, map_layers, scan_layers, with_layers_apart

T = TypeVar("T")
LARGE = stacks.LARGE
MLP_WEIGHT = f"f32[{tiny.MODEL.text.intermediate_size},{tiny.MODEL.text.hidden_size}]"


@pytest.fixture(autouse=True)
def every_stack_is_large(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(stacks, "LARGE", 0)


def stacked(dtype: str = "float32") -> nnx.State:
  """Three layers x -> x * scale, 16 wide."""
  scale = jnp.arange(1, 49, dtype=dtype).reshape(3, 16) / 7
  return nnx.State({"scale": nnx.Param(scale, axes=(None,))})


def layers(params: nnx.State) -> list[Apart]:
  is_apart = lambda x: isinstance(x, Apart)  # noqa: E731
  return [x for x in jax.tree.leaves(params, is_leaf=is_apart) if is_apart(x)]


def few_ids() -> TokenIds:
  """[SEG] and two others alone may be generated."""
  return decoding.ids(allowed=(decoding.ids().seg, 40, 41))


def asked(function: Callable[..., T], params: nnx.State) -> T:
  """`generate`, or the lowering of `write_text`, with the parameters."""
  return function(
    nnx.graphdef(tiny.loaded().model),
    params,
    decoding.inputs(),
    jax.random.key(0),
    max_new_tokens=decoding.NEW_TOKENS,
    max_masks=decoding.MAX_MASKS,
    sampling=decoding.GREEDY,
    ids=few_ids(),
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_views_of_their_stack(dtype: str):
  params = stacked(dtype)
  whole = params["scale"].get_value()
  (apart,) = layers(with_layers_apart(params))
  size = 16 * whole.dtype.itemsize
  starts = [x.unsafe_buffer_pointer() - whole.unsafe_buffer_pointer() for x in apart.layers]
  if dtype == "float32":  # 64 bytes each; shorter layers are copied, XLA wants them so aligned
    assert starts == [0, size, 2 * size]
  np.testing.assert_array_equal(np.stack(apart.layers), whole)
  assert {x.dtype for x in apart.layers} == {whole.dtype}


def test_of_a_model_the_stacks_alone_are_cut():
  model = tiny.loaded().model
  apart = with_layers_apart(nnx.state(model))
  text, vision = apart["qwen"]["language_model"], apart["qwen"]["visual"]
  cut = [text["layers"], vision["blocks"], vision["deepstack_merger_list"]]
  assert len(layers(text["layers"])) == len(
    jax.tree.leaves(nnx.state(model.qwen.language_model.layers))
  )
  assert len(layers(apart)) == sum(len(layers(part)) for part in cut)
  weight = text["layers"]["mlp"]["gate_proj"]["weight"].get_value()
  assert len(weight.layers) == tiny.MODEL.text.num_layers


def test_a_program_reads_the_layers_where_they_lie():
  """No slice or copy of a weight of the text layers: every layer is an argument."""
  params = nnx.state(tiny.loaded().model)
  made = rf"= {re.escape(MLP_WEIGHT)}\S* (?!parameter|get-tuple-element|bitcast)(\w[\w-]*)\("
  assert re.search(made, asked(write_text.lower, params).compile().as_text())
  assert not re.search(made, asked(write_text.lower, with_layers_apart(params)).compile().as_text())


def test_generation_is_the_same():
  expected = decoding.run(few_ids())
  out = asked(generate, with_layers_apart(nnx.state(tiny.loaded().model)))
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  np.testing.assert_allclose(out.low_res_masks, expected.low_res_masks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_loops_over_layers(apart: bool):
  state = with_layers_apart(stacked()) if apart else stacked()
  scale = np.asarray(stacked()["scale"].get_value())
  rows = jnp.arange(3.0)

  def body(x, layer):
    layer_state, row = layer
    return x * layer_state["scale"].get_value() + row, None

  x = np.linspace(-1, 1, 16, dtype=np.float32)
  out = scan_layers(body, jnp.asarray(x), state, rows)
  np.testing.assert_allclose(out, ((x * scale[0]) * scale[1] + 1) * scale[2] + 2, rtol=1e-6)
  xs = jnp.stack([jnp.asarray(x)] * 3)
  out = map_layers(lambda s, x: x * s["scale"].get_value(), state, xs)
  np.testing.assert_allclose(out, x * scale, rtol=1e-6)
  np.testing.assert_array_equal(layer_of(state, 2)["scale"].get_value(), scale[2])


def test_stacks_of_small_models_stay(monkeypatch):
  monkeypatch.setattr(stacks, "LARGE", LARGE)
  assert not layers(with_layers_apart(nnx.state(tiny.loaded().model)))
  wide = nnx.State({"scale": nnx.Param(jnp.ones((2, LARGE // 8)), axes=(None,))})
  assert layers(with_layers_apart(wide))


def test_a_stack_of_both_kinds_is_run(monkeypatch):
  """Matrices apart, norms in their stack, as in large models."""
  size = tiny.MODEL.text.num_layers * tiny.MODEL.text.hidden_size**2 * 4
  monkeypatch.setattr(stacks, "LARGE", size)
  params = with_layers_apart(nnx.state(tiny.loaded().model))
  assert 0 < len(layers(params["qwen"]["language_model"]["layers"])) < 8
  out = asked(generate, params)
  expected = decoding.run(few_ids())
  np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_other_devices_keep_their_stacks(monkeypatch):
  monkeypatch.setattr(stacks, "on_one_cpu", lambda: False)
  assert not layers(with_layers_apart(stacked()))


def test_a_predictor_without_a_mesh_has_its_layers_apart():
  config = dataclasses.replace(tiny.EVAL, batch_size=1)
  assert layers(Predictor(tiny.loaded(), config)._params)
