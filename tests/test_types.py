"""Types agree in all code but the tests' own (pyproject.toml, [tool.mypy])."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WRONG = """
from vrt_jax.data.trace import seg_roles
from vrt_jax.types import TextInputs

def tokens(text: TextInputs) -> str:
  return text.input_ids

roles: int = seg_roles("")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("mypy")


def checked(cache: Path, *files: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *files]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_types_agree(cache: Path):
  done = checked(cache)
  assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_types_are_found(cache: Path, tmp_path: Path):
  file = tmp_path / "wrong.py"
  file.write_text(WRONG)
  done = checked(cache, str(file))
  assert done.returncode == 1
  assert [line.split("[")[-1] for line in done.stdout.splitlines() if "error" in line][:2] == [
    "return-value]",
    "assignment]",
  ]
