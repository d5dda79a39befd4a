"""Runs that are killed or told to stop go on as if nothing had happened, bit for bit."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.train import processes, run_tiny
from tests.train.processes import slow
from vrt_jax.train.preemption import EXIT_STATUS

STEPS = 6


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return run_tiny.write_records(tmp_path_factory.mktemp("restart") / "records")


@pytest.fixture(scope="module")
def straight(records: Path) -> Path:
  """A run without an accident."""
  workdir = records.parent / "straight"
  status, _, err = processes.run(records, workdir, steps=STEPS)
  assert status == 0, err
  return workdir


def assert_same_run(workdir: Path, straight: Path) -> None:
  """Every logged figure and every array of the last checkpoint."""
  assert processes.logged(workdir) == processes.logged(straight)
  assert set(processes.compiles(workdir)) == {1}
  a, b = (processes.saved_arrays(w, STEPS) for w in (workdir, straight))
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("step", [4, *slow(1, 6)])
def test_kill_and_restart(step: int, records: Path, straight: Path, tmp_path: Path):
  status, _, err = processes.run(records, tmp_path / "run", steps=STEPS, kill_at=step)
  assert status == -9, err
  assert not (tmp_path / "run" / "model").exists()
  status, _, err = processes.run(records, tmp_path / "run", steps=STEPS)
  assert status == 0, err
  assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
def test_two_kills_and_a_restart(records: Path, straight: Path, tmp_path: Path):
  for step in (3, 5):
    status, _, err = processes.run(records, tmp_path / "run", steps=STEPS, kill_at=step)
    assert status == -9, err
  status, _, err = processes.run(records, tmp_path / "run", steps=STEPS)
  assert status == 0, err
  assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("step", [1, *slow(3)])
def test_sigterm_saves_the_step_that_runs(step: int, records: Path, straight: Path, tmp_path: Path):
  status, out, _ = processes.run(records, tmp_path / "run", steps=STEPS, term_at=step)
  assert status == EXIT_STATUS
  line = f"stopped by SIGTERM after step {step}, which is saved; the same command goes on"
  assert out.splitlines()[-1] == line
  assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
  status, out, err = processes.run(records, tmp_path / "run", steps=STEPS)
  assert status == 0, err
  assert f"resumed from step {step}" in out
  assert_same_run(tmp_path / "run", straight)


def test_bad_batches_are_skipped_across_a_restart_and_end_a_run(records: Path, tmp_path: Path):
  workdir = tmp_path / "run"
  options = {"steps": STEPS, "poison": [2, 4, 5], "max_skipped_steps": 2}
  status, _, _ = processes.run(records, workdir, term_at=3, **options)
  assert status == EXIT_STATUS
  for _ in range(2):  # the second time it stops again
    status, _, err = processes.run(records, workdir, **options)
    assert status == 1
    message = "the loss or gradient of 3 steps was not finite (limit 2, optim.max_skipped_steps)"
    assert err.splitlines()[-1] == f"error: step 5: {message}"
  lines = processes.logged(workdir)
  assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 3]
  assert [line["loss"] is None for line in lines] == [False, True, False, True, True]


@pytest.mark.slow
def test_processes_that_were_joined_stop_after_the_same_step(records: Path, tmp_path: Path):
  done = processes.run_together(
    2, records, tmp_path / "run", last={"term_at": 4}, steps=300, log_every=50
  )
  assert [status for status, _, _ in done] == [EXIT_STATUS] * 2, done
  (line,) = [x for x in done[0][1].splitlines() if x.startswith("stopped by SIGTERM")]
  step = int(line.split()[5].rstrip(","))
  assert 4 <= step < 300
  assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
  assert "stopped" not in done[1][1]


def test_a_disk_that_fills_up_ends_a_run_with_one_line(records: Path, tmp_path: Path):
  small = tmp_path / "small"
  small.mkdir()
  mounted = shutil.which("mount") and subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True
  )
  if not mounted or mounted.returncode:
    pytest.skip("a small file system cannot be mounted here")
  try:
    options = {"steps": 40, "checkpoint_every": 1, "keep_checkpoints": 40}
    status, _, err = processes.run(records, small / "run", **options)
    assert status == 1
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"was not written \(.*[Nn]o space.*\); the last good one is of step \d+$", err)
    last = int(err.rsplit(" ", 1)[1])
    moved = tmp_path / "run"
    shutil.copytree(small / "run", moved)
  finally:
    subprocess.run(["umount", str(small)], check=True)
  status, out, err = processes.run(records, moved, **options)  # with more room it goes on
  assert status == 0, err
  assert f"resumed from step {last}" in out
