"""Checkpoints of a run: trainable parameters, optimiser, step and data position, through Orbax."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx

from vrt_jax.train.state import TrainState


class Checkpoints:
  """The folder `checkpoints/` of a workdir; saving is atomic and runs in the background."""

  def __init__(self, workdir: Path, every: int, keep: int):
    options = ocp.CheckpointManagerOptions(
      save_interval_steps=every, max_to_keep=keep, enable_async_checkpointing=True
    )
    self._manager = ocp.CheckpointManager(workdir.resolve() / "checkpoints", options=options)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, None without one."""
    return self._manager.latest_step()

  def due(self, step: int) -> bool:
    """Whether a checkpoint of this step is to be saved."""
    return self._manager.should_save(step)

  def save(self, state: TrainState, data_state: dict) -> None:
    """Saves a state and the data position that goes with it; a step that is there stays."""
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(to_pure(state)), data=ocp.args.JsonSave(data_state)
    )
    self._manager.save(step, args=args, force=True)

  def restore(self, state: TrainState) -> tuple[TrainState, dict]:
    """The newest checkpoint, in the shapes, dtypes and shardings of `state`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_pure(state))
    restored = self._manager.restore(
      self.latest_step(),
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
      ),
    )
    return from_pure(state, restored.state), restored.data

  def close(self) -> None:
    """Waits for a save that is under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def to_pure(state: TrainState) -> dict:
  """Nested dicts of arrays, which Orbax stores by name."""
  return {
    "step": state.step,
    "trainable": nnx.to_pure_dict(state.trainable),
    "opt_state": jax.tree.map(
      lambda s: nnx.to_pure_dict(s) if isinstance(s, nnx.State) else s,
      state.opt_state,
      is_leaf=lambda s: isinstance(s, nnx.State),
    ),
  }


def from_pure(like: TrainState, pure: dict) -> TrainState:
  """The inverse of `to_pure`, in the structure of `like`."""

  def fill(target: object, values: object) -> object:
    if not isinstance(target, nnx.State):
      return values
    filled = jax.tree.map(lambda x: x, target)
    nnx.replace_by_pure_dict(filled, values)
    return filled

  return TrainState(
    step=pure["step"],
    trainable=fill(like.trainable, pure["trainable"]),
    opt_state=jax.tree.map(
      fill, like.opt_state, pure["opt_state"], is_leaf=lambda s: isinstance(s, nnx.State)
    ),
  )
