"""Copies a model directory into the package, in bfloat16.

python -m scripts.ship_model --model runs/shapes_sft/model --name shapes_sft
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from vrt_jax import cli, model_directory

ASSETS = Path(__file__).resolve().parents[1] / "vrt_jax" / "assets"
MAX_MB = 10.0


@dataclass(frozen=True)
class Args:
  """Copies a model directory into the package, in bfloat16."""

  model: Path
  """Model directory."""
  name: str = "shapes_base"
  """Folder below vrt_jax/assets."""
  assets: Path = ASSETS


def size_mb(folder: Path) -> float:
  """Bytes of all files below a folder, in units of a million."""
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def ship(args: Args) -> Path:
  """Writes the model directory and returns its path.

  Raises:
    ValueError: no model there, or one above 10 MB; then nothing is shipped.
  """
  if Path(args.name).name != args.name:
    raise ValueError(f"--name is one folder name, not {args.name}")
  loaded = model_directory.load(str(args.model))
  target = args.assets / args.name
  candidate = args.assets / f"{args.name}.candidate"
  model_directory.save(candidate, loaded.model, loaded.tokenizer, loaded.image, dtype="bfloat16")
  size = size_mb(candidate)
  if size > MAX_MB:
    shutil.rmtree(candidate)
    raise ValueError(f"the model takes {size:.1f} MB, above {MAX_MB:.0f} MB")
  shutil.rmtree(target, ignore_errors=True)
  candidate.rename(target)
  print(f"{target}: {size:.2f} MB")
  return target


if __name__ == "__main__":
  cli.run(lambda: ship(cli.parse(Args, sys.argv[1:], "python -m scripts.ship_model", __doc__)))
