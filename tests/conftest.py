"""Fixtures shared by all tests."""

import os
from pathlib import Path

if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")  # GPUs would round to 10 bits

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
  """Folder with real photographs and the real Qwen3 tokenizer; tests skip where it is missing."""
  if not SHARED_DATA.is_dir():
    pytest.skip(f"the shared test data is not at {SHARED_DATA}")
  return SHARED_DATA


@pytest.fixture(scope="session")
def photos(shared_data) -> Path:
  """Folder of the photographs in both record layouts."""
  folder = shared_data / "photos"
  if not folder.is_dir():
    pytest.skip(f"no photographs at {folder}")
  return folder
