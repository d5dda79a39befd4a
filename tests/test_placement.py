"""Where parameters and batches live."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from tests import tiny
from vrt_jax.config import MeshConfig
from vrt_jax.placement import (
  fetch,
  gather_rows,
  local_rows,
  param_shardings,
  put_batch,
  put_whole_batch,
  replicate,
)
from vrt_jax.runtime import LOGICAL_AXES, make_mesh


def test_every_parameter_has_a_place_and_known_axes():
  state = nnx.state(tiny.random_model(tiny.train_config().model))
  shardings = param_shardings(state, make_mesh(MeshConfig()))
  assert all(x.mesh.axis_names == ("data", "fsdp", "tensor") for x in jax.tree.leaves(shardings))
  for _, variable in nnx.to_flat_state(state):
    assert set(variable.get_metadata().get("axes", ())) <= set(LOGICAL_AXES)


def test_batches_and_keys_on_the_mesh():
  mesh = make_mesh(MeshConfig())
  batch = tiny.batch()
  for put in (put_batch, put_whole_batch):
    placed = put(batch, mesh)
    assert placed.text.input_ids.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert placed.text.position_ids.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    jax.tree.map(np.testing.assert_array_equal, fetch(placed), batch)
  key = replicate(jax.random.key(3), mesh)
  assert jax.random.bits(key) == jax.random.bits(jax.random.key(3))


def test_rows_come_back_in_order():
  mesh = make_mesh(MeshConfig())
  rows = {"a": np.arange(8.0).reshape(4, 2), "b": np.arange(4)}
  jax.tree.map(np.testing.assert_array_equal, local_rows(put_batch(rows, mesh), mesh), rows)
  assert gather_rows(rows["a"], mesh) is rows["a"]  # all of them are here
