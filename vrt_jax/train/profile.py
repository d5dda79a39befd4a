"""A trace of some steps for xprof."""

from pathlib import Path
from types import TracebackType

import jax

NUM_STEPS = 3


class Profile:
  """Traces `NUM_STEPS` steps from `first_step` on into WORKDIR/profile; 0 traces none."""

  def __init__(self, workdir: Path, first_step: int):
    self._folder = workdir / "profile"
    self._first = first_step
    self._running = False

  def before(self, step: int) -> None:
    """Starts or ends the trace where `step`, which is about to run, says so."""
    if self._running and step >= self._first + NUM_STEPS:
      self._stop()
    elif self._first and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._running = False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._running:
      self._stop()
