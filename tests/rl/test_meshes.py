"""Rollout and update on one device and on eight, as programs are for CPUs and for TPUs.

The same samples, masks, losses and gradients.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.train import processes
from tests.train.test_equivalence import largest_gap, part

RTOL = 1e-4
RUNS = ("2x2x2", "tpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("meshes")


@functools.cache
def computed(folder: Path) -> dict[str, dict[str, np.ndarray]]:
  """What `on_meshes` writes, by run."""
  return processes.arrays_by("tests.rl.on_meshes", folder / "runs.npz", "one", *RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_the_rollout_is_the_same(run: str, folder: Path):
  one, eight = (part(computed(folder)[name], "['rollout']") for name in ("one", run))
  tokens = "['rollout'].completions.tokens"
  np.testing.assert_array_equal(eight[tokens], one[tokens])
  rows = one[tokens].reshape(-1, one[tokens].shape[-1])
  assert len({tuple(r) for r in rows.tolist()}) > len(rows) // 2  # each row has its own numbers
  assert largest_gap(one, eight) < RTOL


@pytest.mark.parametrize("run", RUNS)
def test_the_update_is_the_same(run: str, folder: Path):
  one, eight = computed(folder)["one"], computed(folder)[run]
  gap = "['metrics']['rollout/logprob_gap']"  # itself a rounding error
  assert max(one[gap], eight[gap]) < 1e-4
  for name, value in part(one, "['metrics']").items():
    if name != gap:
      np.testing.assert_allclose(eight[name], value, rtol=RTOL, atol=2e-6, err_msg=name)
  assert one["['metrics']['loss/mask_bce']"] > 0
  found = {name: v for name, v in part(one, "['moments']").items() if ".mu" in name}
  assert max(np.abs(v).max() for v in found.values()) > 0
  other = {name: eight[name] for name in found}
  assert largest_gap(found, other) < RTOL
