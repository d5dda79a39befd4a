"""Writes the shapes world to TFRecord files.

python -m scripts.make_shapes --out DIR --train N --eval M --seed S [--task trace|refer|framed]
python -m scripts.make_shapes --out DIR --train 12 --eval 0 --preview shapes.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from vrt_jax import cli
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import TFRecordSource, parse_train
from vrt_jax.data.shapes import write_shapes

PREVIEW_COLUMNS = 6
PREVIEW_TILE_PX = 224


@dataclass(frozen=True)
class Args:
  """Writes the shapes world in the VRT-80k and the VRT-Eval record layout."""

  out: str
  """Folder to write to."""
  train: int = 10000
  """Training samples."""
  eval: int = 300
  """Evaluation samples (trace task only)."""
  seed: int = 0
  task: Literal["trace", "refer", "framed"] = "trace"
  """Reasoning questions with traces, referring requests, or these with the marks of a trace."""
  shards: int = 1
  """Files the training samples are spread over."""
  workers: int | None = None
  """Processes; one a usable core unless given."""
  preview: Path | None = None
  """Picture file for a sheet of the first training pictures."""


def contact_sheet(path: str, count: int) -> Image.Image:
  """The first `count` pictures of a record file, side by side."""
  source = TFRecordSource(path)
  count = min(count, len(source))
  rows = -(-count // PREVIEW_COLUMNS)
  sheet = Image.new("RGB", (PREVIEW_COLUMNS * PREVIEW_TILE_PX, rows * PREVIEW_TILE_PX), "white")
  for i in range(count):
    picture = decode_image(parse_train(source[i]).image)
    row, column = divmod(i, PREVIEW_COLUMNS)
    left = column * PREVIEW_TILE_PX + (PREVIEW_TILE_PX - picture.width) // 2
    sheet.paste(picture, (left, row * PREVIEW_TILE_PX + (PREVIEW_TILE_PX - picture.height) // 2))
  return sheet


def main(args: Args) -> None:
  """Writes the files and prints what each holds."""
  num_eval = args.eval if args.task == "trace" else 0
  paths = write_shapes(
    args.out, args.train, num_eval, args.seed, args.task, args.shards, args.workers
  )
  for path in paths:
    print(f"{path}: {len(TFRecordSource(path))} records")
  if args.preview:
    contact_sheet(paths[0], 2 * PREVIEW_COLUMNS).save(args.preview)


if __name__ == "__main__":
  cli.run(lambda: main(cli.parse(Args, sys.argv[1:], "python -m scripts.make_shapes", __doc__)))
