"""Checkpoints: round trip, interval, number kept, and half-written ones."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vrt_jax.config import MeshConfig
from vrt_jax.runtime import make_mesh
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.state import TrainState, create_state

CONFIG = tiny.train_config()


def new_state(seed: int) -> TrainState:
  model = tiny.random_model(CONFIG.model, seed)
  return create_state(
    model, make_optimizer(CONFIG.optim), trainable_filter("adapters"), make_mesh(MeshConfig())
  )[0]


@pytest.fixture(scope="module")
def state() -> TrainState:
  """A state with recognisable, non-zero moments."""
  fresh = new_state(0)
  return fresh.replace(opt_state=jax.tree.map(lambda x: x + 1, fresh.opt_state))


def at(state: TrainState, step: int) -> TrainState:
  return state.replace(step=jnp.full_like(state.step, step))


def save(folder: Path, state: TrainState, steps: range | list[int], every: int = 1, keep: int = 9):
  checkpoints = Checkpoints(folder, every, keep)
  for step in steps:
    checkpoints.save(at(state, step), {"position": step})
  checkpoints.close()


def steps_in(folder: Path) -> set[str]:
  return {p.name for p in (folder / "checkpoints").iterdir()}


def test_round_trip_is_exact(state: TrainState, tmp_path: Path):
  save(tmp_path, state, [7])
  checkpoints = Checkpoints(tmp_path, 1, 1)
  assert checkpoints.latest_step() == 7
  restored, data = checkpoints.restore(new_state(1))
  checkpoints.close()
  assert data == {"position": 7}
  jax.tree.map(np.testing.assert_array_equal, restored, at(state, 7))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert (a.dtype, a.sharding) == (b.dtype, b.sharding)


def test_no_checkpoint_yet(tmp_path: Path):
  checkpoints = Checkpoints(tmp_path, 1, 1)
  assert checkpoints.latest_step() is None
  checkpoints.close()


def test_interval_and_number_kept(state: TrainState, tmp_path: Path):
  checkpoints = Checkpoints(tmp_path, every=4, keep=2)
  for step in range(1, 11):
    if checkpoints.due(step) or step == 10:
      checkpoints.save(at(state, step), {"position": step})
  checkpoints.save(at(state, 10), {"position": 10})  # there already
  checkpoints.close()
  assert steps_in(tmp_path) == {"8", "10"}


def test_half_written_checkpoints_are_passed_over(state: TrainState, tmp_path: Path):
  save(tmp_path, state, [1, 2])
  root = tmp_path / "checkpoints"
  shutil.copytree(root / "2", root / "3.orbax-checkpoint-tmp")  # a save that was cut off
  checkpoints = Checkpoints(tmp_path, 1, 9)
  assert checkpoints.latest_step() == 2
  restored, data = checkpoints.restore(new_state(1))
  checkpoints.close()
  assert int(restored.step) == 2
  assert data == {"position": 2}
