"""The table of what RL gained."""

import json

import numpy as np
import pytest

from scripts import rl_table
from vrt_jax.metrics import PredictedMask, SampleResult, score_samples

SIZE = (10, 10)


def block(width: int) -> np.ndarray:
  mask = np.zeros(SIZE, bool)
  mask[:, :width] = True
  return mask


def write_run(folder, seed: int, widths: list[int]):
  """A workdir whose answers have IoUs of width / 10, and whose evidence is found."""
  samples = [
    SampleResult(
      key=str(i),
      question="?",
      text="<answer>[SEG]</answer>",
      image_size=SIZE,
      reasoning_gt=[block(10)],
      answer_gt=[block(10)],
      objects=[PredictedMask(block(10), "reasoning"), PredictedMask(block(width), "answer", 1)],
    )
    for i, width in enumerate(widths)
  ]
  (folder / "eval" / "final").mkdir(parents=True)
  path = folder / "eval" / "final" / "ver_evaluation_results.json"
  path.write_text(json.dumps(score_samples(samples)))
  (folder / "config.json").write_text(json.dumps({"seed": seed}))
  steps = [{"step": 1, "step_seconds": 30}, {"step": 11, "step_seconds": 9}, {"step": 11, "x": 1}]
  (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in steps))
  return folder


def test_rows_means_and_intervals(tmp_path, monkeypatch, capsys):
  sft = write_run(tmp_path / "sft", 0, [4, 6, 8, 5] * 5)
  rl = [write_run(tmp_path / f"rl{i}", i, [5 + i, 7, 9, 6] * 5) for i in range(2)]
  plain = write_run(tmp_path / "plain", 0, [4, 6, 8, 6] * 5)
  out = tmp_path / "table.md"
  argv = ["rl_table", "--sft", sft, "--rl", *rl, "--without", plain, "--out", out]
  monkeypatch.setattr("sys.argv", [str(a) for a in argv])
  rl_table.main()
  text = out.read_text()
  assert text == capsys.readouterr().out
  assert "| sft | 0 | 2 | 100.0 | 100.0 | 57.5 |" in text
  assert "| rl1 | 1 | 2 | 100.0 | 100.0 | 70.0 |" in text
  gain = next(line for line in text.splitlines() if line.startswith("| RL, mean of 2, minus SFT"))
  assert "| +0.0 [+0.0, +0.0] |" in gain and "+11.2 [" in gain
  assert "RL with minus without" in text and "20 held-out samples" in text


def test_an_unfinished_run_is_named(tmp_path):
  with pytest.raises(ValueError, match="is no finished run"):
    rl_table.read_run(tmp_path)


def test_minutes_count_every_step_once():
  lines = [
    {"step": 10, "step_seconds": 3.0},
    {"step": 10, "eval": 1},
    {"step": 25, "step_seconds": 2},
  ]
  assert rl_table.train_minutes(lines) == 1.0
