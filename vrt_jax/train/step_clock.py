"""Watches over the steps: how long they take, what is compiled, how many are skipped."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from vrt_jax.runtime import CompileCounter
from vrt_jax.types import Batch


class StepClock:
  """Mean step time and token rate since the last reading."""

  def __init__(self, shares: int = 1):
    """`shares`: of equal size, one of which each counted batch is."""
    self._shares = shares
    self.start()

  def start(self) -> None:
    """Starts anew."""
    self._start = time.perf_counter()
    self._steps = 0
    self._tokens = 0
    self._parts: dict[str, float] = {}

  def count(self, batch: Batch) -> None:
    """Adds one step on a host batch; padding is no token."""
    self.count_tokens(self._shares * int(batch.text.token_mask.sum()))

  def count_tokens(self, tokens: int) -> None:
    """Adds one step on so many tokens of all processes."""
    self._steps += 1
    self._tokens += tokens

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Measures a part of the step, which `read` gives as `<name>_seconds`."""
    start = time.perf_counter()
    yield
    self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

  def read(self) -> dict[str, float]:
    """`step_seconds`, `tokens_per_second` and the parts, means a step, and starts anew."""
    seconds = time.perf_counter() - self._start
    values = {"step_seconds": seconds / self._steps, "tokens_per_second": self._tokens / seconds}
    values |= {f"{name}_seconds": total / self._steps for name, total in self._parts.items()}
    self.start()
    return values


class SkipLimit:
  """Stops a run with too many skipped steps.

  Counts are read a step late, so that the host does not wait for the devices.
  """

  def __init__(self, limit: int):
    self._limit = limit
    self._before: tuple[int, jax.Array] | None = None

  def check(self, step: int, skipped: jax.Array) -> None:
    """Takes the number of skipped steps up to `step` and looks at the one before.

    Raises:
      FloatingPointError: it is above the limit.
    """
    self.finish()
    self._before = (step, skipped)

  def finish(self) -> None:
    """Looks at the last number; FloatingPointError as of `check`."""
    if self._before is None:
      return
    step, skipped = self._before
    if int(skipped) > self._limit:
      raise FloatingPointError(
        f"step {step}: the loss or gradient of {int(skipped)} steps was not finite (limit "
        f"{self._limit}, optim.max_skipped_steps)"
      )


class CompiledOnce:
  """A jitted step that may compile at the first batch of each shape and never again."""

  def __init__(self, step: Callable, **static: Any):
    """`static`: keyword arguments of every call that do not change."""
    self._step, self._static = step, static
    self._seen: set[tuple] = set()
    self.compiles = 0

  def __call__(self, *args: Any) -> Any:
    """Runs the step, whose third argument is the batch.

    Raises:
      RuntimeError: a known shape is compiled again.
    """
    shapes = tuple(x.shape for x in jax.tree.leaves(args[2]))
    counter = CompileCounter()
    if shapes not in self._seen:
      compile_step(self._step, *args, **self._static)  # the call below finds it
    result = self._step(*args, **self._static)
    counter.close()
    self.compiles += counter.count
    if counter.count and shapes in self._seen:
      raise RuntimeError(f"a step on the known batch shapes {shapes} compiled again")
    self._seen.add(shapes)
    return result


def compile_step(step: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
  """Compiles a jitted step for its arguments and gives the memory that took back to the system.

  glibc would keep it: about an eighth more memory at the step's peak on CPUs.
  """
  compiled = step.lower(*args, **static).compile()
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)
  return compiled
