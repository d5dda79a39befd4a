"""Which code made a file."""

import functools
import subprocess
from pathlib import Path

import vrt_jax


@functools.cache
def code_version() -> str:
  """The package's version and, in a git checkout, its commit: "0.1.0+5a7a585b1c2d"."""
  command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
  try:
    commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
  except (OSError, subprocess.SubprocessError):
    return vrt_jax.__version__
  return f"{vrt_jax.__version__}+{commit.strip()}"
