"""Mesh, placement and compile counting."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests import tiny
from vrt_jax.config import MeshConfig
from vrt_jax.runtime import LOGICAL_AXES, CompileCounter, make_mesh, param_shardings, put_batch


def test_mesh_takes_what_is_left():
  mesh = make_mesh(MeshConfig(data=-1))
  assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
  with pytest.raises(ValueError, match="does not fit"):
    make_mesh(MeshConfig(data=jax.device_count() + 1))


def test_every_parameter_has_a_place_and_known_axes():
  state = nnx.state(tiny.random_model(tiny.train_config().model))
  shardings = param_shardings(state, make_mesh(MeshConfig()))
  flat = dict(nnx.to_flat_state(shardings))
  query = flat[("qwen", "language_model", "layers", "self_attn", "q_proj", "weight")].get_value()
  assert query.spec == PartitionSpec(None, "tensor", "fsdp")  # stacked layers lead
  for _, variable in nnx.to_flat_state(state):
    assert set(variable.get_metadata().get("axes", ())) <= set(LOGICAL_AXES)


def test_put_batch_divides_the_batch_axis():
  placed = put_batch(tiny.batch(), make_mesh(MeshConfig()))
  assert placed.text.input_ids.sharding.spec == PartitionSpec(("data", "fsdp"))
  assert placed.text.position_ids.sharding.spec == PartitionSpec(None, ("data", "fsdp"))


def test_compile_counter_sees_compilations_until_it_is_closed():
  function = jax.jit(lambda x: x * 3 + 1)
  x = jnp.ones(3)
  counter = CompileCounter()
  function(x)
  function(x)
  assert counter.count == 1
  counter.close()
  function(jnp.ones(5))
  assert counter.count == 1
