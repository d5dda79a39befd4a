"""Devices: the mesh, and where each array lives on it."""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vrt_jax.config import MeshConfig

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: dict[str | None, str | None] = {
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv": "tensor",
  "mlp": "tensor",
  "lora": None,
  "vision_embed": "fsdp",
  "vision_heads": "tensor",
  "vision_mlp": "tensor",
  None: None,
}
"""Logical parameter axis -> mesh axis."""


def make_mesh(config: MeshConfig) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  devices = jax.device_count()
  known = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if -1 in sizes or int(np.prod(sizes)) != devices:
    raise ValueError(f"mesh {tuple(sizes)} (data, fsdp, tensor) does not fit {devices} devices")
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


class CompileCounter:
  """Counts XLA compilations of this process from its creation on."""

  EVENT = "/jax/core/compile/backend_compile_duration"

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, **metadata: object) -> None:
    if event == self.EVENT:
      self.count += 1

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._listen)


def batch_sharding(mesh: Mesh, batch_axis: int = 0) -> NamedSharding:
  """The batch dimension over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, ("data", "fsdp")))


def mesh_axes(
  axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> list[str | None]:
  """The mesh axis of each dimension of a parameter with logical `axes`, on a mesh of `sizes`.

  A dimension that the mesh axis does not divide stays whole; stacked layers lead and have none.
  """
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  names = [LOGICAL_AXES[a] for a in axes]
  return [
    n if n is not None and size % sizes[n] == 0 else None
    for n, size in zip(names, shape, strict=True)
  ]


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


def put_batch(batch: T, mesh: Mesh) -> T:
  """Host arrays -> device arrays, the batch dimension divided over the mesh.

  `batch` is a `Batch` or what else holds `TextInputs` as `text`; only their position_ids [3, B, T]
  have another axis before the batch's.
  """
  sharding = batch_sharding(mesh)
  positions = batch_sharding(mesh, batch_axis=1)
  shardings = jax.tree.map(lambda _: sharding, batch)
  shardings = shardings.replace(text=shardings.text.replace(position_ids=positions))
  return jax.device_put(batch, shardings)


def use_cpu_cores(batch_size: int) -> None:
  """Makes several CPU devices, so that a mesh divides a batch over the cores.

  XLA runs much of a program on one core a device. The number is the largest power of two up to the
  number of cores that divides `batch_size`. Accelerators are not touched. Where devices are in use
  already they stay as they are.
  """
  devices = 1
  while 2 * devices <= (os.cpu_count() or 1) and batch_size % (2 * devices) == 0:
    devices *= 2
  try:
    jax.config.update("jax_num_cpu_devices", devices)
  except RuntimeError:
    return
