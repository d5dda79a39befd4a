"""Runs of GRPO that are killed or told to stop go on as if nothing had happened, bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from tests.train import processes, run_tiny
from tests.train.processes import slow
from vrt_jax.train.preemption import EXIT_STATUS

STEPS = 6
OPTIONS = {
  "algorithm": "grpo",
  "steps": STEPS,
  "learning_rate": 1e-3,
  "grpo": {
    "drop_equal_groups": True,
    "max_refills": 2,
    "extra_rewards": [["tests.rl.user_rewards:vowels", 1.0]],
  },
}
"""Equal groups are common, so that steps take different numbers of batches."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return run_tiny.write_records(tmp_path_factory.mktemp("restart") / "records")


@pytest.fixture(scope="module")
def straight(records: Path) -> Path:
  """A run without an accident."""
  workdir = records.parent / "straight"
  status, _, err = processes.run(records, workdir, **OPTIONS)
  assert status == 0, err
  return workdir


def assert_same_run(workdir: Path, straight: Path) -> None:
  """Every logged figure and every array of the last checkpoint."""
  assert processes.logged(workdir) == processes.logged(straight)
  a, b = (processes.saved_arrays(w, STEPS) for w in (workdir, straight))
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_run_learns_and_refills(straight: Path):
  lines = processes.logged(straight)
  refills = [line["refills"] for line in lines]
  assert min(refills) < max(refills)
  assert all(line["grad_norm"] > 0 for line in lines if line["advantage/max"] > 0)
  assert max(processes.compiles(straight)) == 3  # rollout, update, and joining rollouts
  assert min(processes.compiles(straight)) >= 2
  before, after = (processes.saved_arrays(straight, step) for step in (STEPS - 2, STEPS))
  assert any((before[name] != after[name]).any() for name in before if "lora_b" in name)


@pytest.mark.parametrize("batch", [6, *slow(1, 9)])
def test_kill_and_restart(batch: int, records: Path, straight: Path, tmp_path: Path):
  status, _, err = processes.run(records, tmp_path / "run", kill_at=batch, **OPTIONS)
  assert status == -9, err
  status, _, err = processes.run(records, tmp_path / "run", **OPTIONS)
  assert status == 0, err
  assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("batch", [5, *slow(1)])
def test_sigterm_saves_the_step_that_runs(
  batch: int, records: Path, straight: Path, tmp_path: Path
):
  status, out, _ = processes.run(records, tmp_path / "run", term_at=batch, **OPTIONS)
  assert status == EXIT_STATUS
  step = int(out.splitlines()[-1].split("after step ")[1].split(",")[0])
  assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
  status, out, err = processes.run(records, tmp_path / "run", **OPTIONS)
  assert status == 0, err
  assert f"resumed from step {step}" in out
  assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
def test_several_updates_of_a_rollout_go_on_too(records: Path, tmp_path: Path):
  """A step is an update: rollouts are saved and logged whole."""
  options = OPTIONS | {"grpo": OPTIONS["grpo"] | {"updates_per_rollout": 2}}
  status, _, err = processes.run(records, tmp_path / "straight", **options)
  assert status == 0, err
  assert [line["step"] for line in processes.logged(tmp_path / "straight")] == [2, 4, 6]
  status, _, err = processes.run(records, tmp_path / "run", kill_at=3, **options)
  assert status == -9, err
  status, _, err = processes.run(records, tmp_path / "run", **options)
  assert status == 0, err
  assert_same_run(tmp_path / "run", tmp_path / "straight")


TWO_MESHES = {
  "mesh": [1, 2, 1],
  "grpo": OPTIONS["grpo"] | {"rollout_tensor": 2},
  "eval": {"tensor": 2},
  "eval_every": 2,
}
"""Prompts, adapters and samples move between the mesh of training and that of rollouts, and
held-out pictures are predicted on such a mesh too."""


@pytest.mark.parametrize("meshes", [{}, TWO_MESHES])
def test_two_processes_make_the_same_decisions(
  meshes: dict, records: Path, straight: Path, tmp_path: Path
):
  done = processes.run_together(2, records, tmp_path / "run", **OPTIONS | meshes)
  assert [status for status, _, _ in done] == [0, 0], done
  together, alone = processes.logged(tmp_path / "run"), processes.logged(straight)
  for a, b in zip(together, alone, strict=True):
    for name in ("reward/mean", "reward/zero_std_share", "refills", "advantage/mean_abs"):
      assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)
    assert a["loss/policy"] == pytest.approx(b["loss/policy"], abs=1e-4)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert ("eval/answer_miou" in a) == (meshes is TWO_MESHES and a["step"] % 2 == 0)
