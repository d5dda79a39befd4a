"""Where activations live inside a jitted function: the batch over the ambient mesh.

The training step and `generate` set that mesh (`on_mesh`). Without one every function here gives
its argument back, so models need not know of it.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from vrt_jax.runtime import batch_parts

FSDP_AXIS = "fsdp"
BATCH_AXES = ("data", FSDP_AXIS)
TENSOR_AXIS = "tensor"


@contextlib.contextmanager
def on_mesh(mesh: AbstractMesh | None) -> Iterator[None]:
  """Inside a function that is traced: its arrays live on `mesh`; None for a single device."""
  with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
    yield


def ambient_mesh() -> AbstractMesh | None:
  """The mesh of `on_mesh`, None without one or on a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def divides_weights() -> bool:
  """Whether the mesh divides parameters over its fsdp axis."""
  mesh = ambient_mesh()
  return mesh is not None and mesh.shape[FSDP_AXIS] > 1


def platform() -> str:
  """What the program that is traced is for, "cpu", "gpu" or "tpu": the mesh's devices, or the
  default."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend()
  return mesh.abstract_device.platform


def on_tpu() -> bool:
  """Whether the program that is traced is for TPUs."""
  return platform() == "tpu"


def on_one_cpu() -> bool:
  """Whether the program that is traced is for a CPU that no mesh divides."""
  return platform() == "cpu" and ambient_mesh() is None


def batch_axes(mesh: AbstractMesh, size: int) -> tuple[str, ...] | None:
  """The mesh axes that a batch of `size` is divided over; None where they do not divide it."""
  return BATCH_AXES if size % batch_parts(mesh) == 0 else None


def devices_of_batch(size: int) -> int:
  """How many devices a batch of `size` is divided over."""
  mesh = ambient_mesh()
  return 1 if mesh is None or batch_axes(mesh, size) is None else batch_parts(mesh)


def rows_per_device(size: int) -> int:
  """How many rows of a batch of `size` a device has."""
  return size // devices_of_batch(size)


def constrain_batch(x: Array, axis: int = 0, *, others: object = None) -> Array:
  """`x` with dimension `axis` divided over the mesh and the others whole on every device.

  `others` may be PartitionSpec.UNCONSTRAINED, which leaves them to the compiler.
  """
  mesh = ambient_mesh()
  if mesh is None:
    return x
  spec = [others] * x.ndim
  spec[axis] = batch_axes(mesh, x.shape[axis])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def rows_by_device(x: Array) -> Array:
  """[B, ..] -> [devices, B / devices, ..]: sums over the second dimension are each device's own.

  One device for all rows where the mesh does not divide them.
  """
  return by_device(x.reshape(devices_of_batch(x.shape[0]), -1, *x.shape[1:]))


def by_device(x: Array) -> Array:
  """[devices, ..] with each device's own on it; the other dimensions are left to the compiler."""
  return constrain_batch(x, others=PartitionSpec.UNCONSTRAINED)


def gathered(x: Array) -> Array:
  """`x` whole on every device."""
  mesh = ambient_mesh()
  return x if mesh is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


def tensor_parts() -> int:
  """Devices of the mesh's tensor axis."""
  mesh = ambient_mesh()
  return 1 if mesh is None else mesh.shape[TENSOR_AXIS]


def rows_by_tensor(x: Array) -> Array:
  """[V, ..] -> [V', ..] whole on every device but for its rows, which the tensor axis divides.

  Where it does not divide V, rows of zeros come last: a vocabulary has the size that it has.
  """
  if ambient_mesh() is None:
    return x
  padding = [(0, -x.shape[0] % tensor_parts())] + [(0, 0)] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(jnp.pad(x, padding), PartitionSpec(TENSOR_AXIS))


def rows_by_every_device(x: Array) -> Array:
  """[B, ..] with the batch divided over all axes of the mesh, the tensor axis too, where it can be.

  For work on each row by itself, which the devices of the tensor axis would all do.
  """
  mesh = ambient_mesh()
  if mesh is None or x.shape[0] % mesh.size:
    return constrain_batch(x)
  return jax.lax.with_sharding_constraint(x, PartitionSpec((*BATCH_AXES, TENSOR_AXIS)))
