"""Bits of rows on meshes of four devices, as a TPU draws them, written to a file.

    python -m tests.ops.bits_on_mesh OUT.json

For each mesh: whether the bits are those of one device, and what part of them a device draws.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vrt_jax.config import MeshConfig
from vrt_jax.ops import random_bits as module
from vrt_jax.ops.sharding import on_mesh
from vrt_jax.placement import replicate
from vrt_jax.runtime import make_mesh

MESHES = ((1, 4, 1), (2, 2, 1), (1, 2, 2))
SHAPES = ((8, 32, 16), (3, 32, 16))
"""Of rows that a mesh divides, and of rows that it does not."""


def drawn(shape: tuple[int, ...], mesh: jax.sharding.Mesh | None) -> tuple[np.ndarray, str]:
  """The bits, and the compiled program of a device."""

  def run(key: jax.Array) -> jax.Array:
    with on_mesh(None if mesh is None else mesh.abstract_mesh):
      return module.random_bits(key, shape, jnp.uint32)

  key = jax.random.key(3)
  if mesh is not None:
    key = replicate(key, mesh)
  program = jax.jit(run).lower(key).compile()
  return np.asarray(program(key)), program.as_text()


def main() -> None:
  """All meshes."""
  jax.config.update("jax_num_cpu_devices", 4)
  module.on_tpu = lambda: True
  found = {}
  for sizes in MESHES:
    mesh = make_mesh(MeshConfig(*sizes))
    for shape in SHAPES:
      got, program = drawn(shape, mesh)
      rows = {int(n) for n in re.findall(rf"u32\[(\d+),{shape[1]},{shape[2]}\]", program)}
      equal = bool((got == drawn(shape, None)[0]).all())
      found["x".join(map(str, (*sizes, *shape)))] = [equal, max(rows)]
  Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
  main()
