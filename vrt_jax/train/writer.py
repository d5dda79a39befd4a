"""Metrics of a run: metrics.jsonl, TensorBoard, and a progress bar with loss and time left."""

import json
import os
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricWriter:
  """Writes one JSON object a logged step to metrics.jsonl and the same to TensorBoard."""

  def __init__(self, workdir: Path, first_step: int, num_steps: int):
    self._path = workdir / "metrics.jsonl"
    drop_lines_from(self._path, first_step)
    self._file = self._path.open("a")
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
    self._bar = tqdm(total=num_steps, initial=first_step, desc="train", unit="step")

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Records the metrics of a step (1-based count of finished steps)."""
    self._file.write(json.dumps({"step": step, **metrics}) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)
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
    self._board.close()
    self._file.close()


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
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(line + "\n" for line in kept))
  os.replace(temporary, path)
