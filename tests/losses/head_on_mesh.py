"""Gradients of token log-probabilities on one device and on meshes of four, written to a file.

    python -m tests.losses.head_on_mesh OUT.json

For each mesh: the largest difference to one device, and how many sums over devices of the head's
gradient the program has inside loops and outside of them.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vrt_jax.config import MeshConfig
from vrt_jax.losses import token
from vrt_jax.ops.sharding import BATCH_AXES, on_mesh
from vrt_jax.runtime import make_mesh

MESHES = ((1, 4, 1), (2, 2, 1), (1, 2, 2))
VOCABULARY, WIDTH = 15, 6


def gradients(mesh: Mesh | None) -> tuple[list[np.ndarray], str]:
  """By states and head, and the compiled program."""
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(8, 32, WIDTH)).astype(np.float32)
  head = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
  tokens = rng.integers(0, VOCABULARY, (8, 32)).astype(np.int32)

  def total(hidden, head):
    return jnp.sum(token.token_logps(hidden, head, tokens, jnp.ones(tokens.shape, bool)))

  def run(hidden, head):
    with on_mesh(None if mesh is None else mesh.abstract_mesh):
      return jax.grad(total, argnums=(0, 1))(hidden, head)

  placement = None
  if mesh is not None:
    rows, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (BATCH_AXES, None))
    hidden, head, placement = *jax.device_put((hidden, head), (rows, whole)), (rows, whole)
  program = jax.jit(run, out_shardings=placement).lower(hidden, head).compile()
  return [np.asarray(x) for x in program(hidden, head)], program.as_text()


def sums_of_head(program: str, parts: int) -> list[int]:
  """All-reduces with the shape of (a part of) the head: inside other computations, at the top."""
  shape = f" = f32[{-(-VOCABULARY // parts)},{WIDTH}]"
  counts = [0, 0]
  for computation in program.split("\n\n"):
    found = [line for line in computation.splitlines() if shape in line and " all-reduce(" in line]
    counts["ENTRY" in computation] += len(found)
  return counts


def main() -> None:
  """All meshes."""
  jax.config.update("jax_num_cpu_devices", 4)
  token.LOGIT_BYTES = 1  # four chunks
  expected, _ = gradients(None)
  found = {}
  for sizes in MESHES:
    got, program = gradients(make_mesh(MeshConfig(*sizes)))
    error = max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))
    found["x".join(map(str, sizes))] = [error, *sums_of_head(program, sizes[2])]
  Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
  main()
