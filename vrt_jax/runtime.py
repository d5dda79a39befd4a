"""Processes and devices: how they find each other, and the mesh with its axes."""

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from vrt_jax.config import MeshConfig
from vrt_jax.cores import usable_cores

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


CLUSTER_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables in which a launcher says how many processes it starts."""
TPU_VM = "TPU_ML_PLATFORM"
"""Set when JAX is imported on a Cloud TPU machine."""


def start_processes() -> None:
  """Joins the processes of a run; one process by itself stays so. Call it before devices are used.

  TPU pods (Compute Engine, GKE), SLURM and Open MPI are recognised by JAX. Elsewhere three
  variables name the run: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. JAX_NUM_PROCESSES=1 alone keeps a process by itself.

  Raises:
    ValueError: one of the three variables is missing or no number.
  """
  given = {name: os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")}
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if jax.distributed.is_initialized() or (address is None and given["NUM_PROCESSES"] == "1"):
    return
  if address is None:
    sizes = [os.environ.get(name, "1") for name in CLUSTER_SIZES]
    if any(size != "1" for size in sizes) or TPU_VM in os.environ:
      _use_gloo_on_cpu()
      jax.distributed.initialize()
    return
  numbers = []
  for name, value in given.items():
    if value is None or not value.isdecimal():
      raise ValueError(f"JAX_COORDINATOR_ADDRESS needs a number in JAX_{name}, which is {value!r}")
    numbers.append(int(value))
  _use_gloo_on_cpu()
  jax.distributed.initialize(
    coordinator_address=address,
    num_processes=numbers[0],
    process_id=numbers[1],
    cluster_detection_method="deactivate",
  )


def _use_gloo_on_cpu() -> None:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")


def is_leader() -> bool:
  """Whether this process prints and writes the files that a run has once."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line once for all processes."""
  if is_leader():
    print(text, flush=True)


def barrier(name: str) -> None:
  """Waits until every process is here; `name` tells places of the program apart."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def largest(value: int) -> int:
  """The largest of the values that the processes give; every process calls this."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
  """(data, fsdp, tensor) on so many devices, -1 worked out.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  if any(s < 1 and s != -1 for s in sizes) or config.slices < 1:
    raise ValueError(f"mesh sizes {tuple(sizes)} and mesh.slices {config.slices} must be positive")
  known = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if -1 in sizes or int(np.prod(sizes)) != devices:
    raise ValueError(f"mesh {tuple(sizes)} (data, fsdp, tensor) does not fit {devices} devices")
  data, fsdp, tensor = sizes
  return data, fsdp, tensor


def make_mesh(config: MeshConfig) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices.

  With `slices`, each holds an equal part of the data axis and whole fsdp and tensor axes: only the
  gradients' sum crosses the data centre's network.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or slices do not divide them.
  """
  sizes = mesh_sizes(config, jax.device_count())
  if config.slices == 1:
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  return Mesh(_slice_devices(sizes, config.slices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_of_several(config: MeshConfig) -> Mesh | None:
  """`make_mesh`, with the same errors; None for a single device, which works without a mesh."""
  mesh = make_mesh(config)
  return mesh if mesh.size > 1 else None


def _slice_devices(sizes: Sequence[int], slices: int) -> np.ndarray:
  """Devices [data, fsdp, tensor] with the slices along data.

  Devices that know no slice (CPUs, GPUs) are cut into equal runs in their order, which is by
  process.
  """
  data, fsdp, tensor = sizes
  if data % slices:
    raise ValueError(f"mesh.slices {slices} does not divide the data axis {data}")
  devices = jax.devices()
  if not hasattr(devices[0], "slice_index"):
    return np.asarray(devices).reshape(sizes)
  found = len({d.slice_index for d in devices})
  if found != slices:
    raise ValueError(f"mesh.slices is {slices}, but there are {found} slices")
  return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1))


def with_tensor(mesh: Mesh, size: int, name: str = "grpo.rollout_tensor") -> Mesh:
  """The same devices in the same order, where `size` neighbours of the fsdp axis join the tensor
  axis.

  Raises:
    ValueError: the fsdp axis is not a multiple of `size`, the field `name`.
  """
  data, fsdp, tensor = (mesh.shape[axis] for axis in MESH_AXES)
  if size < 1 or fsdp % size:
    raise ValueError(f"{name} {size} does not divide mesh.fsdp {fsdp}")
  if size == 1:
    return mesh
  devices = mesh.devices.reshape(data, fsdp // size, size * tensor)
  return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
  """Equal parts into which the mesh divides a batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def data_share(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of this process's share of each batch.

  Processes that are joined by the tensor axis read the same share.

  Raises:
    ValueError: the processes' devices do not divide the rows of a batch into equal shares.
  """
  owners = mesh.devices.reshape(batch_parts(mesh), -1)
  parts: dict[int, set[int]] = {}
  for part, devices in enumerate(owners):
    for device in devices:
      parts.setdefault(device.process_index, set()).add(part)
  shares = sorted({tuple(sorted(p)) for p in parts.values()})
  if sum(map(len, shares)) != len(owners) or len({len(s) for s in shares}) > 1:
    raise ValueError(
      f"mesh {dict(mesh.shape)}: its processes share parts of a batch unequally; choose "
      "mesh.tensor so that it divides the devices of a process, or is a multiple of them"
    )
  return shares.index(tuple(sorted(parts[jax.process_index()]))), len(shares)


class CompileCounter:
  """Counts XLA compilations of this process from its creation on."""

  EVENT = "/jax/core/compile/backend_compile_duration"

  def __init__(self) -> None:
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **metadata: str | int) -> None:
    if event == self.EVENT:
      self.count += 1

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._listen)


def mesh_axes(
  axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> list[str | None]:
  """The mesh axis of each dimension of a parameter with logical `axes`, on a mesh of `sizes`.

  A dimension that its mesh axis does not divide stays whole, and a mesh axis divides one dimension
  at most. Where none is left for fsdp, it takes the largest named dimension that is free, so that
  every matrix is divided. Stacked layers lead and have no name.
  """
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  names: list[str | None] = []
  for axis, size in zip(axes, shape, strict=True):
    name = LOGICAL_AXES[axis]
    fits = name is not None and sizes[name] > 1 and size % sizes[name] == 0
    names.append(name if fits and name not in names else None)
  if "fsdp" not in names and sizes["fsdp"] > 1:
    free = [i for i, a in enumerate(axes) if a and not names[i] and shape[i] % sizes["fsdp"] == 0]
    if free:
      names[max(free, key=lambda i: shape[i])] = "fsdp"
  return names


def use_cpu_cores(batch_size: int) -> None:
  """Makes several CPU devices, so that a mesh divides a batch over the cores.

  XLA runs much of a program on one core a device. The number is the largest power of two that
  divides `batch_size` and is no more than the cores this process may use. Accelerators are not
  touched. Where devices are in use already they stay as they are, and each of several processes
  keeps one device.
  """
  if jax.distributed.is_initialized():
    return
  cores = usable_cores()
  devices = 1
  while 2 * devices <= cores and batch_size % (2 * devices) == 0:
    devices *= 2
  try:
    jax.config.update("jax_num_cpu_devices", devices)
  except RuntimeError:
    return
