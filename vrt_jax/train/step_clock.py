"""How long steps take, and that each batch shape is compiled once."""

import time
from collections.abc import Callable

import jax

from vrt_jax.runtime import CompileCounter
from vrt_jax.types import Batch


class StepClock:
  """Mean step time and token rate since the last reading."""

  def __init__(self):
    self._start = time.perf_counter()
    self._steps = 0
    self._tokens = 0

  def count(self, batch: Batch) -> None:
    """Adds one step on a host batch; padding is no token."""
    self._steps += 1
    self._tokens += int(batch.text.token_mask.sum())

  def read(self) -> dict[str, float]:
    """`step_seconds` and `tokens_per_second`, and starts anew."""
    seconds = time.perf_counter() - self._start
    values = {"step_seconds": seconds / self._steps, "tokens_per_second": self._tokens / seconds}
    self._start, self._steps, self._tokens = time.perf_counter(), 0, 0
    return values


class CompiledOnce:
  """A step function that may compile at the first batch of each shape and never again."""

  def __init__(self, step: Callable):
    self._step = step
    self._seen: set[tuple] = set()
    self.compiles = 0

  def __call__(self, state, frozen, batch: Batch, key):
    """Runs the step; RuntimeError where a known shape is compiled again."""
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    counter = CompileCounter()
    result = self._step(state, frozen, batch, key)
    counter.close()
    self.compiles += counter.count
    if counter.count and shapes in self._seen:
      raise RuntimeError(f"a step on the known batch shapes {shapes} compiled again")
    self._seen.add(shapes)
    return result
