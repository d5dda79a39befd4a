"""Bits of rows on meshes of four devices, as a TPU draws them, written to a file.

    python -m tests.ops.bits_on_mesh OUT.json

For each mesh and number of rows: whether the bits are those of one device, and how many rows a
device draws at most.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tests.four_devices import run_on, write_found
from vrt_jax.ops import random_bits as module
from vrt_jax.placement import replicate

ROWS = (8, 3)
"""Divided by every mesh, and by none."""
ROW = (32, 16)


def drawn(rows: int, mesh: Mesh | None) -> tuple[np.ndarray, str]:
  """The bits, and the compiled program of a device."""
  key = jax.random.key(3)
  if mesh is not None:
    key = replicate(key, mesh)
  run = run_on(
    mesh, lambda key: module.random_bits(key, (rows, *ROW), jnp.uint32, lambda bits: bits)
  )
  program = jax.jit(run).lower(key).compile()
  return np.asarray(program(key)), program.as_text()


def measure(mesh: Mesh) -> dict[int, list]:
  """By number of rows."""
  found = {}
  for rows in ROWS:
    got, program = drawn(rows, mesh)
    counts = re.findall(rf"u32\[(\d+),{ROW[0]},{ROW[1]}\]", program)
    found[rows] = [bool((got == drawn(rows, None)[0]).all()), max(map(int, counts))]
  return found


if __name__ == "__main__":
  module.on_tpu = lambda: True
  write_found(measure)
