"""Timing in turns, and what the machine can do at most."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
  """Seconds of each function: the median of `repeats`, which take turns, after one unmeasured."""
  for run in runs.values():
    run()
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      started = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - started)
  return {name: statistics.median(values) for name, values in seconds.items()}


def gemm_gflops(side: int = 2048, repeats: int = 7) -> float:
  """GFLOP/s of a float32 matrix product in JAX: the machine's practical limit of arithmetic."""
  import jax
  import jax.numpy as jnp

  a = jnp.ones((side, side))
  product = jax.jit(lambda a: a @ a)
  seconds = _best(lambda: jax.block_until_ready(product(a)), repeats)
  return 2 * side**3 / seconds / 1e9


def memory_gbytes(megabytes: int = 800, repeats: int = 7) -> float:
  """GB/s at which a float32 matrix-vector product reads: the practical limit of decoding."""
  import jax
  import jax.numpy as jnp

  columns = 2048
  matrix = jnp.ones((megabytes * 2**20 // 4 // columns, columns))
  vector = jnp.ones(columns)
  product = jax.jit(lambda m, v: m @ v)
  seconds = _best(lambda: jax.block_until_ready(product(matrix, vector)), repeats)
  return matrix.nbytes / seconds / 1e9


def _best(run: Callable[[], object], repeats: int) -> float:
  run()
  seconds = []
  for _ in range(repeats):
    started = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - started)
  return min(seconds)
