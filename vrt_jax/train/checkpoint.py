"""Checkpoints of a run, through Orbax: all it takes to go on as if nothing had happened.

    checkpoints/<step>/state   trainable parameters, optimiser, step, skipped steps (arrays)
                       data    position in the training data (JSON)
                       run     random key, LoRA settings, held-out metrics (JSON)

A checkpoint is written in the background under a temporary name, which it loses when it is
complete. Older ones are deleted after that; the last `keep` and the best one stay.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from vrt_jax.config import LoraConfig
from vrt_jax.data.pipeline import StreamState
from vrt_jax.runtime import barrier, is_leader, largest
from vrt_jax.train.checkpoint_files import check_arrays, first_line, free_name, read_item
from vrt_jax.train.state import TrainState, from_pure, to_pure

FOLDER = "checkpoints"
UNREADABLE = (OSError, ValueError, KeyError, TypeError)
"""What Orbax raises where files are missing, cut off or not what they should be."""

METADATA_BYTES = 4_000_000
"""Room for what a checkpoint holds beside its arrays."""


@dataclass(frozen=True)
class Restored:
  """A checkpoint that was read."""

  state: TrainState
  data: StreamState
  """State of the data iterator."""
  key: jax.Array
  """Random key of the run; a step folds its number in."""
  metrics: dict[str, float]
  """Held-out metrics, empty where none were computed at this step."""


class KeepLastAndBest(PreservationPolicy):
  """The last `keep` checkpoints and the one with the highest value of a metric."""

  def __init__(self, keep: int, values: dict[int, float]):
    """`values` has the metric of each step that has one, and is read when a choice is made."""
    self._keep, self._values = keep, values

  def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
    steps = [c.step for c in checkpoints]
    best = best_of({s: v for s, v in self._values.items() if s in steps})
    return [i >= len(steps) - self._keep or step == best for i, step in enumerate(steps)]


def best_of(values: dict[int, float]) -> int | None:
  """The step with the highest value, the later one of equals."""
  return max(values, key=lambda step: (values[step], step), default=None)


class Checkpoints:
  """The folder `checkpoints/` of a workdir. Every process calls every method.

  Args:
    workdir: of the run.
    every: steps between checkpoints.
    keep: how many of the last ones stay.
    lora: the adapters' settings; a checkpoint with others is refused.
    best_metric: name in the held-out metrics by which the best checkpoint is chosen.
  """

  def __init__(self, workdir: Path, every: int, keep: int, lora: LoraConfig, best_metric: str = ""):
    self._folder = workdir.resolve() / FOLDER
    self._every, self._lora, self._best_metric = every, lora, best_metric
    self._unfinished = sorted(self._folder.glob("*.orbax-checkpoint-tmp*"))
    barrier("checkpoints are listed")
    self._values: dict[int, float] = {}
    options = ocp.CheckpointManagerOptions(
      preservation_policy=KeepLastAndBest(keep, self._values),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)
    for step in self.steps():
      self._note_metrics(step, self._metrics_of(step))

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def due(self, step: int) -> bool:
    """Whether a checkpoint of this step is to be saved."""
    return step % self._every == 0

  def best_step(self) -> int | None:
    """The checkpoint with the highest best_metric, None where none has metrics."""
    return best_of({s: v for s, v in self._values.items() if s in self.steps()})

  def save(
    self,
    state: TrainState,
    data_state: StreamState,
    key: jax.Array,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Saves a state and what goes with it; a step that is there stays.

    Arrays are copied before it returns, files are written in the background.

    Raises:
      OSError: the disk has no room for it, or this or the save before it could not be written; good
        checkpoints stay.
    """
    step = int(state.step)
    if step in self.steps():
      return
    self.wait()
    self._check_room(sum(x.nbytes for x in jax.tree.leaves(state)) + METADATA_BYTES)
    run = {
      "rng_key": np.asarray(jax.random.key_data(key)).tolist(),
      "lora": dataclasses.asdict(self._lora),
      "metrics": metrics or {},
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(to_pure(state)),
      data=ocp.args.JsonSave(data_state),
      run=ocp.args.JsonSave(run),
    )
    self._note_metrics(step, metrics or {})
    try:
      self._manager.save(step, args=args, force=True)
    except UNREADABLE as error:
      raise self._not_written(error) from error

  def restore(self, like: TrainState) -> Restored | None:
    """The newest checkpoint that can be read, in shapes, dtypes and placement of `like`.

    Damaged ones are passed over with a warning and renamed, so that their step can be saved
    again. None where there is no checkpoint.

    Raises:
      ValueError: every checkpoint is damaged, or the newest good one has other LoRA settings.
    """
    damaged: dict[int, str] = {}
    for step in reversed(self.steps()):
      restored, problem = self._try(step, like)
      if largest(int(bool(problem))):  # all processes take the same one
        damaged[step] = problem or "another process cannot read it"
        continue
      self._set_aside(damaged, step)
      self._report_unfinished(step)
      return restored
    if damaged:
      newest = max(damaged)
      raise ValueError(
        f"no checkpoint in {self._folder} can be read (step {newest}: {damaged[newest]}); move the "
        "folder away to start anew"
      )
    self._report_unfinished(0)
    return None

  def restore_step(self, step: int, like: TrainState) -> Restored:
    """The checkpoint of one step.

    Raises:
      ValueError: it cannot be read, or has other LoRA settings.
    """
    restored, problem = self._try(step, like)
    if restored is None:
      raise ValueError(f"checkpoint {self._folder / str(step)} cannot be read: {problem}")
    return restored

  def _try(self, step: int, like: TrainState) -> tuple[Restored | None, str]:
    """(checkpoint, "") or (None, what is wrong with it). Processes do not wait for each other."""
    folder = self._folder / str(step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_pure(like))
    try:
      run = read_item(folder / "run")
      data = read_item(folder / "data")
      key = jax.random.wrap_key_data(jnp.asarray(run["rng_key"], jnp.uint32))
      found, metrics = run["lora"], run["metrics"]
      check_arrays(folder / "state")
      with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        pure = handler.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
      if int(pure["step"]) != step:
        raise ValueError(f"it holds step {int(pure['step'])}")
    except UNREADABLE as error:
      return None, first_line(error)
    if found != (wanted := dataclasses.asdict(self._lora)):
      raise ValueError(f"checkpoint {folder} was written with LoRA {found}, the run has {wanted}")
    return Restored(from_pure(like, pure), data, key, metrics), ""

  def _set_aside(self, damaged: dict[int, str], used: int) -> None:
    """Renames damaged checkpoints and says so; nothing is deleted."""
    for step, problem in damaged.items():
      folder = self._folder / str(step)
      if is_leader():
        kept = free_name(folder.with_name(f"{step}.damaged"))
        os.rename(folder, kept)
        warn(f"checkpoint {folder} is damaged ({problem}): step {used} is used, it is now {kept}")
      self._values.pop(step, None)
    if damaged:
      barrier("damaged checkpoints are renamed")
      self._manager.reload()

  def _report_unfinished(self, used: int) -> None:
    for folder in self._unfinished:
      warn(f"a save was cut off ({folder.name} is removed): step {used} is used")

  def _metrics_of(self, step: int) -> dict[str, float]:
    try:
      return read_item(self._folder / str(step) / "run")["metrics"]
    except UNREADABLE:
      return {}  # `restore` says more about it

  def _note_metrics(self, step: int, metrics: dict[str, float]) -> None:
    if self._best_metric in metrics:
      self._values[step] = metrics[self._best_metric]

  def _check_room(self, num_bytes: int) -> None:
    """Orbax is not begun on a disk that is too full: it would leave more than one message."""
    usage = shutil.disk_usage(self._folder)
    is_short = 0 < usage.total and usage.free < num_bytes  # some network disks tell no size
    if largest(int(is_short)):
      needed, free = (f"{n / 1e6:,.0f} MB" for n in (num_bytes, usage.free))
      raise self._not_written(OSError(f"No space left: it needs {needed}, {free} are free"))

  def _not_written(self, error: BaseException) -> OSError:
    good = [int(p.name) for p in self._folder.glob("*") if p.name.isdecimal()]
    kept = f"the last good one is of step {max(good)}" if good else "there is no other"
    return OSError(f"a checkpoint in {self._folder} was not written ({first_line(error)}); {kept}")

  def wait(self) -> None:
    """Waits for a save that is under way; OSError where it could not be written."""
    try:
      self._manager.wait_until_finished()
    except UNREADABLE as error:
      raise self._not_written(error) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    try:
      self.wait()
    except OSError:
      if error is None:
        raise
      return  # the error that ends the run is reported, not what follows from it
    self._manager.close()


def warn(text: str) -> None:
  """One line on standard error, once for all processes."""
  if is_leader():
    print(f"warning: {text}", file=sys.stderr, flush=True)
