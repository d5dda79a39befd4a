"""The embedded world cannot be answered without looking."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vrt_jax.metrics.results import RESULTS_FILE


@pytest.mark.slow
def test_a_blind_model_finds_nothing(tmp_path: Path):
  command = [sys.executable, "-m", "vrt_jax.train", "--data.blind", "--workdir", str(tmp_path)]
  subprocess.run(command, check=True)
  results = json.loads((tmp_path / "eval" / "final" / RESULTS_FILE).read_text())
  print(results["metrics"])
  assert results["metrics"]["reasoning_lq"] < 0.15
  assert results["metrics"]["answer_miou"] < 0.10
  texts = [sample["prediction"]["text"] for sample in results["detailed_results"]]
  traced = [text.startswith("<think>") and "<vea>" in text for text in texts]
  assert sum(traced) > 0.9 * len(traced)  # it has learned to write traces all the same
