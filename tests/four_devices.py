"""What a test module finds on meshes of four devices, in a process that has them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from vrt_jax.config import MeshConfig
from vrt_jax.ops.sharding import on_mesh
from vrt_jax.runtime import make_mesh

MESHES = ((1, 4, 1), (2, 2, 1), (1, 2, 2))
"""data x fsdp x tensor."""


def write_found(measure: Callable[[Mesh], object]) -> None:
  """Writes `measure`'s results by mesh as JSON to the file that the command line names."""
  jax.config.update("jax_num_cpu_devices", 4)
  found = {"x".join(map(str, sizes)): measure(make_mesh(MeshConfig(*sizes))) for sizes in MESHES}
  Path(sys.argv[1]).write_text(json.dumps(found))


def run_on(mesh: Mesh | None, function: Callable) -> Callable:
  """`function`, traced as a program for the mesh; None for one device."""

  def run(*args):
    with on_mesh(None if mesh is None else mesh.abstract_mesh):
      return function(*args)

  return run
