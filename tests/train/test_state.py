"""The training state: dtypes, placement, and the table of parameters."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from vrt_jax.config import MeshConfig
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.runtime import make_mesh
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.state import (
  Frozen,
  TrainState,
  create_state,
  parameter_counts,
  parameter_table,
)

CONFIG = tiny.train_config()


def state_of(
  compute_dtype: str, optimizer: Literal["adamw", "muon"] = "adamw"
) -> tuple[TrainState, Frozen, Sa2VA]:
  rule = make_optimizer(dataclasses.replace(CONFIG.optim, optimizer=optimizer))
  config = dataclasses.replace(CONFIG.model, compute_dtype=compute_dtype)
  model = tiny.random_model(config)
  state, frozen = create_state(model, rule, trainable_filter("adapters"), make_mesh(MeshConfig()))
  return state, frozen, model


def test_merge_gives_the_model_back():
  state, frozen, model = state_of("float32")
  merged = frozen.merge(state.trainable)
  assert merged.config == model.config
  jax.tree.map(np.testing.assert_array_equal, nnx.state(merged), nnx.state(model))
  assert int(state.step) == 0


def test_frozen_parameters_take_the_compute_dtype_and_trained_ones_float32():
  state, frozen, _ = state_of("bfloat16")
  assert {x.dtype for x in jax.tree.leaves(frozen.params)} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
  floats = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert {x.dtype for x in floats} == {jnp.dtype("float32")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_array_lives_on_the_mesh(optimizer: str):
  state, frozen, _ = state_of("float32", optimizer)
  assert len(jax.tree.leaves(state.opt_state)) > 10
  for leaf in jax.tree.leaves((state, frozen)):
    assert leaf.sharding.mesh.axis_names == ("data", "fsdp", "tensor")


def test_parameter_counts():
  state, frozen, model = state_of("float32")
  counts = parameter_counts(state, frozen)
  total = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
  assert sum(a + b for a, b in counts.values()) == total
  assert counts["sam2.mask_decoder"][1] == 0
  assert counts["sam2.image_encoder"][0] == 0
  trained, fixed = counts["qwen.language_model"]
  assert 0 < trained < fixed
  assert counts["text_hidden_fcs.fc1"] == (32 * 32 + 32, 0)
  table = parameter_table(state, frozen).splitlines()
  assert len(table) == len(counts) + 2
  trained = sum(c[0] for c in counts.values())
  last = f"total {trained:,} {total - trained:,} {100 * trained / total:.2f}%"
  assert table[-1].split() == last.split()


def test_a_mesh_that_does_not_fit_raises():
  with pytest.raises(ValueError, match=r"mesh .* does not fit"):
    make_mesh(MeshConfig(data=jax.device_count() + 1))
