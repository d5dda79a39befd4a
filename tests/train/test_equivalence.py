"""One device equals eight, one process two, one step eight parts; checkpoints move between them.

Tolerances are for float32: sums run in another order on another mesh.
"""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.train import processes, run_tiny
from vrt_jax import model_directory

RTOL = 1e-4
"""Of losses and gradients; gradients relative to the largest of their array (2e-5 was measured)."""
STEPS = 4

SLOW_MESHES = ("8x1x1", "1x8x1", "1x1x8")
MESHES = pytest.mark.parametrize(
  "mesh", ["2x2x2", "tpu", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW_MESHES)]
)

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("meshes")


@functools.cache
def computed(folder: Path, *names: str) -> dict[str, Arrays]:
  """What `on_meshes` writes, by run."""
  file = folder / f"{names[0]}_{names[1]}.npz"
  return processes.arrays_by("tests.train.on_meshes", file, *names)


def part(arrays: Arrays, start: str) -> Arrays:
  return {name: value for name, value in arrays.items() if name.startswith(start)}


def gradients(arrays: Arrays) -> Arrays:
  """First moments of AdamW, which are gradients times 1 - b1."""
  found = {name: v for name, v in part(arrays, "['moments']").items() if ".mu" in name}
  assert len(found) > 40
  return found


def largest_gap(a: Arrays, b: Arrays) -> float:
  """Largest difference, relative to the largest value of its array."""
  assert a.keys() == b.keys()
  return max(np.abs(a[k] - b[k]).max() / (np.abs(a[k]).max() + 1e-12) for k in a)


def runs_with(mesh: str, folder: Path) -> dict[str, Arrays]:
  """All meshes take minutes to compile, one of them with every axis seconds."""
  if mesh not in SLOW_MESHES:
    return computed(folder, "one", "2x2x2", "tpu", "halves")
  return computed(folder, "one", *SLOW_MESHES)


@MESHES
def test_one_device_equals_eight(mesh: str, folder: Path):
  runs = runs_with(mesh, folder)
  one, eight = runs["one"], runs[mesh]
  for name, value in part(one, "['metrics']").items():
    np.testing.assert_allclose(eight[name], value, rtol=RTOL, err_msg=name)
  mine, theirs = gradients(one), gradients(eight)
  largest = max(np.abs(v).max() for v in mine.values())
  for name, value in mine.items():
    # a bias before a softmax has no gradient but rounding
    scale = max(np.abs(value).max(), 1e-3 * largest)
    np.testing.assert_allclose(theirs[name], value, rtol=0, atol=RTOL * scale, err_msg=name)


@MESHES
def test_updated_parameters_are_equal(mesh: str, folder: Path):
  """AdamW's first step is the rate times the sign of the gradient: clear signs are compared."""
  runs = runs_with(mesh, folder)
  one, eight = runs["one"], runs[mesh]
  moments = gradients(one)
  largest = max(np.abs(v).max() for v in moments.values())
  compared = 0
  for name, value in part(one, "['trainable']").items():
    (moment,) = [v for k, v in moments.items() if k.endswith(".mu" + name[len("['trainable']") :])]
    clear = np.abs(moment) > 1e-4 * largest
    np.testing.assert_allclose(eight[name][clear], value[clear], rtol=1e-5, atol=1e-5)
    compared += int(clear.sum())
  assert compared > 5_000


@pytest.mark.slow
def test_eight_parts_equal_one(folder: Path):
  runs = computed(folder, "text1", "text8")
  one, eight = runs["text1"], runs["text8"]
  for name in ("loss", "loss/text", "grad_norm"):
    key = f"['metrics']['{name}']"
    np.testing.assert_allclose(eight[key], one[key], rtol=RTOL)
  mine, theirs = gradients(one), gradients(eight)
  largest = max(np.abs(v).max() for v in mine.values())
  for name, value in mine.items():
    np.testing.assert_allclose(theirs[name], value, rtol=0, atol=RTOL * largest, err_msg=name)


def test_the_tolerance_sees_a_wrong_mean(folder: Path):
  runs = runs_with("2x2x2", folder)
  assert largest_gap(gradients(runs["one"]), gradients(runs["halves"])) > 1000 * RTOL


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return run_tiny.write_records(tmp_path_factory.mktemp("equivalence") / "records")


@pytest.fixture(scope="module")
def one_process(records: Path) -> Path:
  """A run on two devices of one process, with two buckets and held-out records."""
  workdir = records.parent / "one"
  status, _, err = processes.run(records, workdir, devices=2, **TWO_BUCKETS)
  assert status == 0, err
  return workdir


TWO_BUCKETS = {"steps": STEPS, "buckets": [[232, 64], [384, 64]], "eval_every": 2}


def test_held_out_records_are_scored_during_training(one_process: Path):
  lines = processes.logged(one_process)
  scored = [line["step"] for line in lines if "eval/answer_miou" in line]
  assert scored == [2, 4]
  assert processes.compiles(one_process)[-1] <= 2  # one a bucket
  for part in ("model", "model_best", "eval/step_2", "eval/final"):
    assert (one_process / part).is_dir(), part
  assert model_directory.load(str(one_process / "model_best")).model.config.lora.rank == 0


def test_two_processes_equal_one(records: Path, one_process: Path, tmp_path: Path):
  together = tmp_path / "two"
  done = processes.run_together(2, records, together, **TWO_BUCKETS)
  assert [status for status, _, _ in done] == [0, 0], done
  printed = [line for line in done[1][1].splitlines() if not line.startswith("[Gloo]")]
  assert printed == []  # only one prints
  assert processes.logged(together) == processes.logged(one_process)
  assert processes.compiles(together) == processes.compiles(one_process)
  names = [
    {str(p.relative_to(w)) for p in w.glob("*/*/") if "tensorboard" not in str(p)}
    for w in (together, one_process)
  ]
  assert names[0] == names[1]
  saved = [processes.saved_arrays(w, STEPS) for w in (together, one_process)]
  assert saved[0].keys() == saved[1].keys()
  for name, value in saved[1].items():
    np.testing.assert_allclose(saved[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  status, out, err = processes.run(records, together, devices=2, **TWO_BUCKETS)
  assert status == 0, err  # the checkpoint of two processes is read by one
  assert f"resumed from step {STEPS}" in out


@pytest.mark.slow
def test_two_processes_divide_the_model_that_they_start_from(
  records: Path, one_process: Path, tmp_path: Path
):
  options = {"steps": 2, "base": str(one_process / "model"), "mesh": [1, 2, 1]}
  done = processes.run_together(2, records, tmp_path / "two", **options)
  assert [status for status, _, _ in done] == [0, 0], done
  status, _, err = processes.run(records, tmp_path / "one", devices=2, **options)
  assert status == 0, err
  saved = [processes.saved_arrays(tmp_path / name, 2) for name in ("two", "one")]
  assert saved[0].keys() == saved[1].keys()
  for name, value in saved[1].items():
    np.testing.assert_allclose(saved[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_checkpoint_of_eight_devices_is_read_by_four_and_by_one(records: Path, tmp_path: Path):
  options = {"steps": STEPS, "batch_size": 8, "checkpoint_every": 2}
  workdir = tmp_path / "run"
  status, _, err = processes.run(records, workdir, devices=8, mesh=[2, 2, 2], **options)
  assert status == 0, err
  assert processes.compiles(workdir) == [1] * STEPS
  script = RESTORE.format(records=str(records), workdir=str(workdir), options=options)
  for devices in (4, 1):
    done = subprocess.run(
      [sys.executable, "-c", script, str(devices)],
      cwd=processes.ROOT,
      env=processes.ENVIRONMENT,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
  saved = processes.saved_arrays(workdir, STEPS)
  for devices in (4, 1):
    with np.load(tmp_path / f"on_{devices}.npz") as restored:
      assert set(restored.files) == set(saved)
      for name in restored.files:
        np.testing.assert_array_equal(restored[name], saved[name], err_msg=name)


RESTORE = """
import sys, jax, numpy as np
from pathlib import Path
from tests import tiny
from tests.train import run_tiny
from vrt_jax.config import MeshConfig
from vrt_jax.runtime import make_mesh
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.state import create_state, to_pure

devices = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", devices)
config = run_tiny.make_config(Path({records!r}), {options!r})
mesh = make_mesh(MeshConfig(1, devices, 1))
fresh = create_state(
  tiny.random_model(config.model), make_optimizer(config.optim), trainable_filter("adapters"), mesh
)[0]
workdir = Path({workdir!r})
with Checkpoints(workdir, 2, 2, config.model.lora) as checkpoints:
  state = checkpoints.restore(fresh).state
assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(fresh)))
flat = jax.tree_util.tree_flatten_with_path(to_pure(state))[0]
name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
arrays = {{name(path): np.asarray(x) for path, x in flat}}
np.savez(workdir.parent / f"on_{{devices}}.npz", **arrays)
"""
