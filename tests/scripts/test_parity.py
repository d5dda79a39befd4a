"""The parity command agrees with PyTorch on a good model and says where a wrong one parts."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from scripts import parity
from tests import tiny
from tests.converters.exports import write_export
from vrt_jax import cli
from vrt_jax.models.qwen3_vl import vision

# transformers pools only in blocks with windows, so the global block is not a stage's first one.
SAM2 = dataclasses.replace(tiny.MODEL.sam2, stages=(1, 1, 2, 1), global_attention_blocks=(3,))


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> list[str]:
  folder = tmp_path_factory.mktemp("parity")
  write_export(folder / "export", dataclasses.replace(tiny.MODEL, sam2=SAM2))
  picture = folder / "picture.png"
  picture.write_bytes(tiny.eval_record(0).image)
  return ["--src", str(folder / "export"), "--image", str(picture), "--question", "Which one?"]


def run(args: list[str], monkeypatch, capsys) -> tuple[dict[str, list[str]], int, str]:
  """Stage -> the rest of its line, exit status, and the error line."""
  monkeypatch.setattr(sys, "argv", ["parity", *args, "--max-new-tokens", "8"])
  status = 0
  try:
    cli.run(parity.main)
  except SystemExit as stop:
    status = stop.code
  out = capsys.readouterr()
  lines = [line.rsplit(maxsplit=4 if "above" in line else 3) for line in out.out.splitlines()]
  errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
  return {line[0].strip(): line[1:] for line in lines if len(line) > 3}, status, "".join(errors)


STAGES = {
  "image patches",
  "visual tokens",
  "deepstack 0",
  "hidden states before the norm",
  "logits",
  "[SEG] prompts",
  "SAM 2 stride 4",
  "SAM 2 stride 8",
  "SAM 2 stride 16",
  "mask logits",
  "predicted IoU",
  "final mask logits",
  "share of mask pixels that differ",
  "greedy characters that differ",
}


def test_a_good_model_passes(args, monkeypatch, capsys):
  rows, status, error = run(args, monkeypatch, capsys)
  assert rows.keys() >= STAGES and (status, error) == (0, "")


def test_bfloat16_has_its_own_tolerances(args, monkeypatch, capsys):
  rows, _, _ = run([*args, "--dtype", "bfloat16"], monkeypatch, capsys)
  assert rows.keys() >= STAGES
  assert float(rows["logits"][0]) > 1e-4
  assert float(rows["image patches"][0]) == 0


def test_another_gelu_is_found_at_its_stage(args, monkeypatch, capsys):
  monkeypatch.setattr(vision, "gelu_exact", vision.gelu_tanh)
  rows, status, error = run(args, monkeypatch, capsys)
  assert status == 1 and "above tolerance: visual tokens, deepstack 0" in error
  assert "above" in rows["visual tokens"] and "above" not in rows["SAM 2 stride 16"]


def test_the_state_after_the_norm_is_found(args, monkeypatch, capsys):
  """PyTorch reads the state before the norm; a model that says otherwise parts at the prompts."""
  folder = Path(args[1])
  config = json.loads((folder / "config.json").read_text())
  ours = parity.our_stages

  def post_norm(loaded, *rest):
    model = loaded.model
    model.config = dataclasses.replace(model.config, seg_hidden="post_norm")
    return ours(loaded, *rest)

  monkeypatch.setattr(parity, "our_stages", post_norm)
  assert config["vrt_jax"]["seg_hidden"] == "pre_norm"
  rows, status, _ = run(args, monkeypatch, capsys)
  assert status == 1
  assert "above" in rows["[SEG] prompts"] and "above" not in rows["logits"]


def test_pixels_near_zero_do_not_count():
  theirs = {"final mask logits": torch.tensor([[[5e-4, 1.0], [-1.0, 1.0]]]).numpy()}
  ours = {"final mask logits": torch.tensor([[[-5e-4, 1.0], [-1.0, 1.0]]]).numpy()}
  *_, row = parity.compare(theirs, ours, "float32")
  assert row.passed and row.error == 0
  ours["final mask logits"][0, 1, 0] = 1.0
  *_, row = parity.compare(theirs, ours, "float32")
  assert not row.passed and row.error == 0.25


def test_a_missing_picture(monkeypatch, capsys, args):
  changed = [*args[:3], "none.png", *args[4:]]
  assert run(changed, monkeypatch, capsys)[1:] == (1, "error: image none.png does not exist")
