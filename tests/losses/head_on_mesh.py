"""Gradients of token log-probabilities on one device and on meshes of four, written to a file.

    python -m tests.losses.head_on_mesh OUT.json

For each mesh: the largest difference to one device, and how many sums over devices of the head's
gradient the program has inside loops and outside of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.four_devices import run_on, write_found
from vrt_jax.losses import token
from vrt_jax.ops.sharding import BATCH_AXES

VOCABULARY, WIDTH = 15, 6


def gradients(mesh: Mesh | None) -> tuple[list[np.ndarray], str]:
  """By states and head, and the compiled program."""
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(8, 32, WIDTH)).astype(np.float32)
  head = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
  tokens = rng.integers(0, VOCABULARY, (8, 32)).astype(np.int32)

  def total(hidden, head):
    return jnp.sum(token.token_logps(hidden, head, tokens, jnp.ones(tokens.shape, bool)))

  placement = None
  if mesh is not None:
    rows, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (BATCH_AXES, None))
    hidden, head, placement = *jax.device_put((hidden, head), (rows, whole)), (rows, whole)
  run = run_on(mesh, jax.grad(total, argnums=(0, 1)))
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


def measure(mesh: Mesh) -> list:
  """The largest difference, and the sums inside loops and outside of them."""
  (got, program), (expected, _) = gradients(mesh), gradients(None)
  error = max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))
  return [error, *sums_of_head(program, mesh.shape["tensor"])]


if __name__ == "__main__":
  token.LOGIT_BYTES = 1  # four chunks
  write_found(measure)
