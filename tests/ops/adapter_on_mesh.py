"""Gradients of an adapter by heads on one device and on meshes of four, written to a file.

    python -m tests.ops.adapter_on_mesh OUT.json

For each mesh: the largest difference to one device, relative to the largest value, and of each
matrix whether an accelerator's program sums its gradient by device.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.four_devices import run_on, write_found
from vrt_jax.ops import linear
from vrt_jax.ops.sharding import BATCH_AXES, FSDP_AXIS

WIDTH, RANK, HEADS, HEAD_DIM = 24, 4, 8, 16


def gradients(mesh: Mesh | None, summed: bool = True) -> tuple[list[np.ndarray], str]:
  """By states and both matrices, and the program before it is divided.

  Not `summed`: of the plain products.
  """
  rng = np.random.default_rng(0)
  shapes = ((8, 32, WIDTH), (RANK, WIDTH), (HEADS, HEAD_DIM, RANK))
  arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  product = linear.low_rank if summed else linear.linear

  def total(x, down, up):
    return jnp.sum(jnp.sin(product(product(x, down), up)))

  placement = None
  if mesh is not None:
    specs = (PartitionSpec(BATCH_AXES), PartitionSpec(FSDP_AXIS), PartitionSpec(FSDP_AXIS))
    placement = tuple(NamedSharding(mesh, spec) for spec in specs)
    arrays = jax.device_put(tuple(arrays), placement)
  run = run_on(mesh, jax.grad(total, argnums=(0, 1, 2)))
  program = jax.jit(run, out_shardings=placement).lower(*arrays)
  return [np.asarray(x) for x in program.compile()(*arrays)], program.as_text()


def sums_by_device(program: str, devices: int) -> list[bool]:
  """Of each matrix: whether a product gives its gradient with a first dimension for devices."""
  shapes = (f"{devices}x{RANK}x{WIDTH}", f"{devices}x{HEADS}x{HEAD_DIM}x{RANK}")
  return [bool(re.search(rf"dot_general .*-> tensor<{shape}xf32>", program)) for shape in shapes]


def measure(mesh: Mesh) -> list:
  """The largest difference, and of each matrix whether its gradient is summed by device."""
  (got, program), (expected, _) = gradients(mesh), gradients(None)
  _, plain = gradients(mesh, summed=False)
  pairs = zip(got, expected, strict=True)
  error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  return [error, sums_by_device(program, devices), sums_by_device(plain, devices)]


if __name__ == "__main__":
  linear.platform = lambda: "tpu"
  write_found(measure)
