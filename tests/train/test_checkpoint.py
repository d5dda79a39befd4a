"""Checkpoints: round trip, number kept, the best one, damaged and cut-off ones, a full disk."""

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import tiny
from vrt_jax.config import LoraConfig, MeshConfig
from vrt_jax.runtime import make_mesh
from vrt_jax.train.checkpoint import Checkpoints, KeepLastAndBest, best_of
from vrt_jax.train.checkpoint_files import check_arrays, first_line, free_name
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.state import TrainState, create_state

CONFIG = tiny.train_config()
KEY = jax.random.key(5)


def new_state(seed: int) -> TrainState:
  model = tiny.random_model(CONFIG.model, seed)
  return create_state(
    model, make_optimizer(CONFIG.optim), trainable_filter("adapters"), make_mesh(MeshConfig())
  )[0]


@pytest.fixture(scope="module")
def state() -> TrainState:
  """A state with recognisable, non-zero moments."""
  fresh = new_state(0)
  return fresh.replace(
    opt_state=jax.tree.map(lambda x: x + 1, fresh.opt_state), skipped=fresh.skipped + 3
  )


@pytest.fixture(scope="module")
def two(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A workdir with checkpoints of steps 1 and 2, to be copied."""
  folder = tmp_path_factory.mktemp("two")
  save(folder, state, {1: {}, 2: {}})
  return folder


def opened(folder: Path, keep: int = 9, lora: LoraConfig = tiny.LORA) -> Checkpoints:
  return Checkpoints(folder, every=1, keep=keep, lora=lora, best_metric="answer_miou")


def at(state: TrainState, step: int) -> TrainState:
  return state.replace(step=jnp.full_like(state.step, step))


def save(folder: Path, state: TrainState, metrics: dict[int, dict], keep: int = 9) -> None:
  """Saves a checkpoint for each step with its held-out metrics."""
  with opened(folder, keep) as checkpoints:
    for step, values in metrics.items():
      checkpoints.save(at(state, step), {"position": step}, KEY, values)


def steps_in(folder: Path) -> set[str]:
  return {p.name for p in (folder / "checkpoints").iterdir()}


def test_round_trip_is_exact(state: TrainState, tmp_path: Path):
  save(tmp_path, state, {7: {"answer_miou": 0.5}})
  with opened(tmp_path) as checkpoints:
    assert checkpoints.steps() == [7]
    restored = checkpoints.restore(new_state(1))
  assert restored.data == {"position": 7}
  assert restored.metrics == {"answer_miou": 0.5}
  assert jax.random.bits(restored.key) == jax.random.bits(KEY)
  jax.tree.map(np.testing.assert_array_equal, restored.state, at(state, 7))
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
    assert (a.dtype, a.sharding) == (b.dtype, b.sharding)


def test_no_checkpoint_yet(state: TrainState, tmp_path: Path):
  with opened(tmp_path) as checkpoints:
    assert checkpoints.restore(state) is None
    assert checkpoints.best_step() is None


def test_interval_and_number_kept(state: TrainState, tmp_path: Path):
  with Checkpoints(tmp_path, every=4, keep=2, lora=tiny.LORA) as checkpoints:
    for step in range(1, 11):
      if checkpoints.due(step) or step == 10:
        checkpoints.save(at(state, step), {"position": step}, KEY)
    checkpoints.save(at(state, 10), {"position": 10}, KEY)  # there already
  assert steps_in(tmp_path) == {"8", "10"}


def test_the_best_checkpoint_stays_across_restarts(state: TrainState, tmp_path: Path):
  values = {1: 0.2, 2: 0.7, 3: 0.1, 4: 0.3}
  save(tmp_path, state, {s: {"answer_miou": v} for s, v in values.items()}, keep=1)
  assert steps_in(tmp_path) == {"2", "4"}
  save(tmp_path, state, {5: {"answer_miou": 0.6}, 6: {}}, keep=1)
  assert steps_in(tmp_path) == {"2", "6"}
  with opened(tmp_path, keep=1) as checkpoints:
    assert checkpoints.best_step() == 2
    best = checkpoints.restore_step(2, new_state(1))
    assert best.metrics == {"answer_miou": 0.7}
    assert int(best.state.step) == 2
    checkpoints.save(at(state, 7), {}, KEY, {"answer_miou": 0.7})  # of equals the later one
    assert checkpoints.best_step() == 7
  assert steps_in(tmp_path) == {"7"}


def test_policy_and_choice():
  assert best_of({}) is None
  assert best_of({3: 0.5, 1: 0.5, 2: 0.4}) == 3

  @dataclasses.dataclass
  class Info:
    step: int

  policy = KeepLastAndBest(1, {1: 0.9, 2: 0.1, 8: 2.0})  # step 8 is gone
  infos = [Info(step) for step in (1, 2, 3)]
  assert policy.should_preserve(infos, context=None) == [True, False, True]


def test_other_lora_settings_are_refused_with_one_line(state: TrainState, two: Path):
  other = dataclasses.replace(tiny.LORA, alpha=8.0)
  with opened(two, lora=other) as checkpoints:
    with pytest.raises(ValueError, match=r"checkpoints/2 was written with LoRA .*4\.0.*8\.0"):
      checkpoints.restore(state)
  assert steps_in(two) == {"1", "2"}


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_largest_array(folder: Path) -> None:
  cut(max((folder / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size))


def empty_step(folder: Path) -> None:
  shutil.rmtree(folder)
  folder.mkdir()


def another_step(folder: Path) -> None:
  shutil.rmtree(folder)
  shutil.copytree(folder.with_name("1"), folder)


DAMAGE: dict[str, Callable[[Path], None]] = {
  "position cut": lambda folder: cut(folder / "data" / "metadata"),
  "run settings gone": lambda folder: (folder / "run" / "metadata").unlink(),
  "table of arrays gone": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
  "tree metadata cut": lambda folder: cut(folder / "state" / "_METADATA"),
  "array cut": cut_largest_array,
  "arrays gone": lambda folder: shutil.rmtree(folder / "state" / "ocdbt.process_0"),
  "state gone": lambda folder: shutil.rmtree(folder / "state"),
  "empty folder": empty_step,
  "that of another step": another_step,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_kept(
  kind: str, state: TrainState, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
  shutil.copytree(two, tmp_path, dirs_exist_ok=True)
  root = tmp_path / "checkpoints"
  DAMAGE[kind](root / "2")
  with opened(tmp_path) as checkpoints:
    restored = checkpoints.restore(new_state(1))
    assert int(restored.state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, restored.state, at(state, 1))
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert f"checkpoint {root / '2'} is damaged" in warning
    assert "step 1 is used" in warning
    assert steps_in(tmp_path) == {"1", "2.damaged"}
    checkpoints.save(at(state, 2), {"position": 2}, KEY)  # the step can be saved again
  assert steps_in(tmp_path) == {"1", "2", "2.damaged"}
  with opened(tmp_path) as checkpoints:
    assert int(checkpoints.restore(new_state(1)).state.step) == 2


def test_only_damaged_checkpoints_are_an_error(state: TrainState, two: Path, tmp_path: Path):
  shutil.copytree(two, tmp_path, dirs_exist_ok=True)
  for step in ("1", "2"):
    cut_largest_array(tmp_path / "checkpoints" / step)
  with opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(step 2: "):
      checkpoints.restore(state)
  assert steps_in(tmp_path) == {"1", "2"}


def test_a_save_that_was_cut_off_is_removed_with_a_warning(
  state: TrainState, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
  shutil.copytree(two, tmp_path, dirs_exist_ok=True)
  root = tmp_path / "checkpoints"
  shutil.copytree(root / "2", root / "3.orbax-checkpoint-tmp")
  with opened(tmp_path) as checkpoints:
    assert int(checkpoints.restore(new_state(1)).state.step) == 2
  warning = "warning: a save was cut off (3.orbax-checkpoint-tmp is removed): step 2 is used"
  assert warning in capsys.readouterr().err
  assert steps_in(tmp_path) == {"1", "2"}


def full(*args: object, **kwargs: object) -> None:
  raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_a_run_with_one_line_and_good_checkpoints(
  state: TrainState, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  shutil.copytree(two, tmp_path, dirs_exist_ok=True)
  message = r"checkpoint in .* was not written \(.*No space.*\); the last good one is of step 2"
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match=message):
      with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 3), {}, KEY)
  with monkeypatch.context() as patch:  # in the background, seen by the next call
    patch.setattr(ocp.JsonCheckpointHandler, "finalize", full, raising=False)
    patch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
    with pytest.raises(OSError, match=message):
      with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 3), {}, KEY)
        checkpoints.wait()
  with monkeypatch.context() as patch:  # noticed before
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=10**6))
    with pytest.raises(OSError, match=r"\(No space left: it needs \d MB, 1 MB are free\)"):
      with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 3), {}, KEY)
  with opened(tmp_path) as checkpoints:
    assert int(checkpoints.restore(new_state(1)).state.step) == 2
  assert steps_in(tmp_path) == {"1", "2"}


def test_helpers(tmp_path: Path):
  assert free_name(tmp_path / "2.damaged").name == "2.damaged"
  for name in ("2.damaged", "2.damaged-2"):
    (tmp_path / name).mkdir()
  assert free_name(tmp_path / "2.damaged").name == "2.damaged-3"
  assert first_line(ValueError("one\ntwo")) == "one"
  assert first_line(KeyError()) == "KeyError"
  with pytest.raises(ValueError, match=r"state holds no arrays"):
    check_arrays(tmp_path / "state")
