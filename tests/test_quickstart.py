"""The quickstart, pasted block by block."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/quickstart.md"
FILES = {
  "Ask": ["record.png", "out/overlay.png", "out/prediction.json"],
  "Score": ["bench/report.html"],
  "Train on own data": ["own/instances.json", "own.tfrecord", "runs/own/model/config.json"],
  "Convert": ["export/config.json", "models/own/config.json", "out_own/overlay.png"],
  "Reinforcement learning": ["runs/own_rl/model/config.json", "runs/own_rl/rollouts"],
}
"""Section -> what its commands write."""


def sections() -> dict[str, str]:
  """Title -> the commands of each section with a bash block."""
  parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
  found = {}
  for title, text in zip(parts[::2], parts[1::2], strict=True):
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if blocks:
      found[title] = "".join(blocks)
  return found


def test_the_sections_are_found():
  assert list(sections()) == ["Install and train", *FILES, "A TPU pod, without one"]


@pytest.mark.slow
def test_every_block_runs_as_it_is(tmp_path):
  for name in ("configs", "scripts"):
    (tmp_path / name).symlink_to(ROOT / name)
  python = tmp_path / "bin/python"
  python.parent.mkdir()
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
  for title, files in FILES.items():
    done = subprocess.run(
      ["bash", "-euo", "pipefail", "-c", sections()[title]],
      cwd=tmp_path,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert done.returncode == 0, f"{title}: {done.stdout[-3000:]}"
    for file in files:
      assert (tmp_path / file).exists(), f"{title}: {file}"
