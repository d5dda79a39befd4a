"""Where arrays live: parameters and batches on the mesh, and what comes back to the host."""

from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vrt_jax.runtime import data_share, mesh_axes
from vrt_jax.types import TextInputs

T = TypeVar("T")


def batch_sharding(mesh: Mesh, batch_axis: int = 0) -> NamedSharding:
  """The batch dimension over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, ("data", "fsdp")))


def _spec(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
  shape = variable.get_value().shape
  axes = variable.get_metadata().get("axes", (None,) * len(shape))
  return NamedSharding(mesh, PartitionSpec(*mesh_axes(axes, shape, mesh.shape)))


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
  """A sharding for every parameter of `state`, from its `axes` metadata.

  An axis whose size the mesh axis does not divide stays whole.
  """
  return jax.tree.map(
    lambda v: v.replace(_spec(v, mesh)), state, is_leaf=lambda v: isinstance(v, nnx.Variable)
  )


def place(tree: T, shardings: object) -> T:
  """Arrays -> the mesh, by a sharding for each; every process has all values of every array."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def put(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # lies on all processes already
      return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(put, tree, shardings)


def place_params(params: nnx.State, mesh: Mesh) -> nnx.State:
  """Parameters -> the mesh, divided by their `axes` metadata; they may lie on another mesh."""
  return place(params, param_shardings(params, mesh))


def replicate(tree: T, mesh: Mesh) -> T:
  """Arrays -> whole on every device of the mesh; random keys too."""
  whole = NamedSharding(mesh, PartitionSpec())

  def put(x: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(place(jax.random.key_data(x), whole))
    return place(x, whole)

  return jax.tree.map(put, tree)


def fetch(tree: object) -> Any:
  """Device arrays -> whole host arrays in the same tree, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def put_batch(batch: T, mesh: Mesh) -> T:
  """This process's rows of a batch -> arrays of the whole batch, divided over the mesh.

  `batch` is any tree of arrays; of `TextInputs` in it position_ids [3, B, T] have another axis
  before the batch's. Which rows a process gives: `data_share`.
  """
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_process_local_data(sharding, x),
    batch,
    batch_shardings(batch, mesh),
  )


def put_whole_batch(batch: T, mesh: Mesh) -> T:
  """Like `put_batch`, where every process has all rows."""
  return place(batch, batch_shardings(batch, mesh))


def batch_shardings(batch: T, mesh: Mesh) -> T:
  """The sharding of every array of a batch, divided by rows."""
  rows, positions = batch_sharding(mesh), batch_sharding(mesh, batch_axis=1)

  def shardings(node: object) -> object:
    if not isinstance(node, TextInputs):
      return rows
    return jax.tree.map(lambda _: rows, node).replace(position_ids=positions)

  return jax.tree.map(shardings, batch, is_leaf=lambda x: isinstance(x, TextInputs))


def local_rows(tree: object, mesh: Mesh) -> Any:
  """This process's rows of device arrays [B, ..], on the host: the inverse of `put_batch`."""

  def rows(x: jax.Array) -> np.ndarray:
    shards = jax.device_put(x, batch_sharding(mesh)).addressable_shards
    by_place = {shard.index[0].start or 0: shard.data for shard in shards}
    return np.concatenate(jax.device_get([by_place[place] for place in sorted(by_place)]))

  return jax.tree.map(rows, tree)


def gather_rows(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
  """All rows [B, ..] of which every process has its share; every process calls this."""
  if jax.process_count() == 1:
    return rows
  index, count = data_share(mesh)
  owners = multihost_utils.process_allgather(np.int32(index))
  parts = multihost_utils.process_allgather(rows)
  return np.concatenate([parts[int(np.argmax(owners == share))] for share in range(count)])
