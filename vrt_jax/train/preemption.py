"""Orderly end on SIGTERM: the step that runs is finished and saved, then the run stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM
"""143, what a shell reports of a process that SIGTERM ended: schedulers start such a job again."""


class Preempted(SystemExit):
  """A run that stopped at SIGTERM and is saved; as an exit it has `EXIT_STATUS`."""

  def __init__(self, step: int):
    super().__init__(EXIT_STATUS)
    self.step = step


class Preemption:
  """Tells after which step to stop.

  One process notes SIGTERM itself; a second SIGTERM ends it at once. Processes that were joined by
  `jax.distributed` are told by its coordinator, so that all stop after the same step.
  """

  def __init__(self) -> None:
    self._asked = False
    self._before: Any = None

  def reached(self, step: int) -> bool:
    """Whether to save and stop after `step`. Every process asks after every step."""
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._asked = True
    signal.signal(number, signal.SIG_DFL)

  def __enter__(self) -> "Preemption":
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and not jax.distributed.is_initialized():
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
