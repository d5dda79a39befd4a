"""Fixtures shared by all tests."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
  # programs run a few times: compiling them quickly counts more
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
else:
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")  # GPUs would round to 10 bits
if "PYTEST_XDIST_WORKER" not in os.environ:
  # compiled programs are shared by the workers and the commands that tests start
  PROGRAMS = tempfile.mkdtemp(prefix="vrt-jax-tests-")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", PROGRAMS)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
  atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)

import pytest

LONG = ("train", "rl", "parity", "generate")
"""Folders whose files take minutes."""
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Long files first, so that no worker is left with one of them at the end."""
  places = {name: place for place, name in enumerate(LONG)}
  items.sort(key=lambda item: places.get(item.path.parent.name, len(LONG)))
