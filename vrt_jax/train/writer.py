"""Metrics of a run: metrics.jsonl, TensorBoard, and a progress bar with loss and time left."""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from vrt_jax.files import write_whole
from vrt_jax.runtime import is_leader


class SilentWriter:
  """What processes have that do not write."""

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Nothing."""

  def advance(self) -> None:
    """Nothing."""

  def __enter__(self) -> "SilentWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    pass


class MetricWriter(SilentWriter):
  """Writes one JSON object a logged step to metrics.jsonl and the same to TensorBoard.

  A figure that is not finite is null in metrics.jsonl, since JSON has no such number, and left out
  of TensorBoard.
  """

  def __init__(self, workdir: Path, first_step: int, num_steps: int):
    self._path = workdir / "metrics.jsonl"
    drop_lines_from(self._path, first_step)
    self._file = self._path.open("a")
    self._board = Board(workdir / "tensorboard", first_step)
    self._bar = tqdm(total=num_steps, initial=first_step, desc="train", unit="step")

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Records the metrics of a step (1-based count of finished steps)."""
    figures = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
    self._file.write(json.dumps({"step": step, **figures}, allow_nan=False) + "\n")
    self._file.flush()
    os.fsync(self._file.fileno())  # a mounted bucket shows it only then
    self._board.write(step, {name: v for name, v in figures.items() if v is not None})
    self._bar.set_postfix(loss=f"{metrics['loss']:.3f}")

  def advance(self) -> None:
    """Moves the progress bar by one step."""
    self._bar.update()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._bar.close()
    try:
      self._board.close()
      self._file.close()
    except OSError:
      if error is None:
        raise  # else the error that ends the run is reported, not what follows from it


class Board:
  """An event file of TensorBoard, written at once: a full disk is an error of the step it meets.

  Steps from `first_step` on that are in older files of the folder are hidden.
  """

  def __init__(self, folder: Path, first_step: int):
    folder.mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(str(folder / "events"))
    start = SessionLog(status=SessionLog.START)
    self._events.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

  def write(self, step: int, figures: dict[str, float]) -> None:
    """Adds the figures of a step."""
    for name, value in figures.items():
      scalar = summary.scalar(name, value)
      self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
    self._events.flush()

  def close(self) -> None:
    """Ends the file."""
    self._events.close()


def open_writer(workdir: Path, first_step: int, num_steps: int) -> SilentWriter:
  """The leader's writer; one that writes nothing for other processes."""
  return MetricWriter(workdir, first_step, num_steps) if is_leader() else SilentWriter()


def drop_lines_from(path: Path, first_step: int) -> None:
  """Removes the lines of steps after `first_step`, which a resumed run writes again."""
  if not path.is_file():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= first_step:
        kept.append(line)
    except json.JSONDecodeError:
      continue  # the run was killed while it wrote this line
  write_whole(path, "".join(line + "\n" for line in kept))
