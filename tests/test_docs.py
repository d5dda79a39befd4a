"""The documentation builds without a warning, and its notebook runs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}


def build(config: Path, out: Path) -> subprocess.CompletedProcess:
  """Builds the site of a configuration file."""
  command = [sys.executable, "-m", "mkdocs", "build", "-f", str(config), "-d", str(out)]
  return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_site_builds_without_a_warning(tmp_path):
  done = build(ROOT / "mkdocs.yml", tmp_path / "site")
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr
  page = (tmp_path / "site" / "reference" / "metrics" / "index.html").read_text()
  assert "IoU of every ground-truth mask with its partner" in page
  for file in (tmp_path / "site").rglob("*.html"):
    assert "fonts.googleapis" not in file.read_text(), "the site loads nothing from elsewhere"


def test_a_broken_link_is_an_error(tmp_path):
  docs = tmp_path / "docs"
  docs.mkdir()
  (docs / "index.md").write_text("[nowhere](nowhere.md)")
  text = (ROOT / "mkdocs.yml").read_text()
  (tmp_path / "mkdocs.yml").write_text(text[: text.index("nav:")])
  done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
  assert done.returncode == 1 and "nowhere.md" in done.stderr


def test_the_notebook_runs():
  notebook = nbformat.read(ROOT / "docs" / "first_steps.ipynb", 4)
  nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
  (result,) = notebook.cells[-1].outputs
  (iou,) = ast.literal_eval(result["data"]["text/plain"])
  assert iou == pytest.approx(0.797, abs=0.05)
