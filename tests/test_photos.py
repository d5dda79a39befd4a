"""Real photographs through training and evaluation, by the command line. Minutes, not seconds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def command(module: str, *args: object) -> str:
  """Runs a command from the repository root and gives what it prints."""
  line = [sys.executable, "-m", module, *map(str, args)]
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


@pytest.fixture(scope="module")
def workdir(photos, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("photos") / "run"
  data = ["--data.train", photos / "photos_train.tfrecord"]
  command("vrt_jax.train", "--config", "configs/photos_smoke.py", "--workdir", path, *data)
  return path


def test_training_on_photographs(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3]
  for line in lines:
    assert line["compiles"] == 1 and line["grad_norm"] > 0
    assert np.isfinite([line["loss"], line["loss/mask_bce"], line["loss/mask_dice"]]).all()
  assert not (workdir / "eval").exists()


def test_the_benchmark_on_photographs(workdir, photos, tmp_path):
  out = command(
    "eval.vrt_bench",
    *("--checkpoint", workdir / "model", "--data", photos / "photos_eval.tfrecord"),
    *("--out", tmp_path, "--max-new-tokens", 16, "--pictures", 2),
  )
  assert "R-LQ" in out and "(7 samples)" in out
  results = json.loads((tmp_path / "ver_evaluation_results.json").read_text())
  assert results["total_reasoning_masks_evaluated"] == 21
  assert {"report.html", "001.png", "002.png"} <= {path.name for path in tmp_path.iterdir()}
