"""Own data for the tests of import_data: annotations in each format, and the command."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from scripts import import_data
from tests.pictures import encoded, picture
from vrt_jax.ops.masks import encode_rle

HEIGHT, WIDTH = 40, 56
SIZE = (HEIGHT, WIDTH)
TRIANGLE = [5.0, 30.0, 25.5, 4.25, 41.0, 33.0]
STAR = [28.0, 2.0, 34.5, 36.0, 8.0, 14.0, 50.0, 15.5, 18.0, 37.5]


def write_pictures(folder: Path) -> Path:
  """images/sub/a.jpg and images/b.png below a folder."""
  (folder / "images" / "sub").mkdir(parents=True)
  (folder / "images/sub/a.jpg").write_bytes(encoded(picture(WIDTH, HEIGHT), "JPEG"))
  (folder / "images/b.png").write_bytes(encoded(picture(WIDTH, HEIGHT, 1)))
  return folder


def entry(objects: object, **fields: object) -> dict:
  """An entry about sub/a.jpg that reasons with all objects and answers with the first."""
  tags = list(objects)
  return {
    "image": "sub/a.jpg",
    "question": "Which one?",
    "reasoning": "There is " + ", ".join(f"one (<ver>{tag}</ver>)" for tag in tags),
    "answer": f"It is (<vea>{tags[0]}</vea>).",
    "objects": objects,
  } | fields


def run(folder: Path, form: str, entries: object, annotations: str, **options: object) -> Path:
  """The command; gives the file it wrote."""
  questions = folder / "questions.json"
  text = entries if isinstance(entries, str) else json.dumps(entries)
  questions.write_text(text)
  out = folder / "own.tfrecord"
  import_data.main(
    import_data.Args(
      format=form,
      questions=questions,
      images=folder / "images",
      annotations=folder / annotations,
      out=out,
      **options,
    )
  )
  return out


def write_coco(folder: Path, **changes: object) -> None:
  blob = np.random.default_rng(0).random(SIZE) < 0.4
  runs, last = [], False
  for value in blob.T.ravel():  # column by column, the first run is outside
    if not runs or value != last:
      runs += [0, 1] if not runs and value else [1]
    else:
      runs[-1] += 1
    last = bool(value)
  content = {
    "images": [
      {"id": 1, "file_name": "sub/a.jpg", "height": HEIGHT, "width": WIDTH},
      {"id": 2, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
    ],
    "categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "plate"}],
    "annotations": [
      {"id": 10, "image_id": 1, "category_id": 3, "segmentation": [TRIANGLE]},
      {"id": 11, "image_id": 1, "category_id": 4, "segmentation": encode_rle(blob)},
      {
        "id": 12,
        "image_id": 1,
        "category_id": 4,
        "segmentation": {"size": list(SIZE), "counts": runs},
      },
      {
        "id": 13,
        "image_id": 1,
        "category_id": 3,
        "segmentation": [[2, 3, 12, 3, 12, 9, 2, 9], [20, 30, 56, 30, 56, 40, 20, 40]],
      },
      {"id": 20, "image_id": 2, "category_id": 3, "segmentation": [STAR]},
    ],
  } | changes
  (folder / "coco.json").write_text(json.dumps(content))


def write_labelme(folder: Path, *shapes: dict, height: int = HEIGHT) -> None:
  (folder / "shapes" / "sub").mkdir(parents=True, exist_ok=True)
  content = {"shapes": shapes, "imageHeight": height, "imageWidth": WIDTH}
  (folder / "shapes/sub/a.json").write_text(json.dumps(content))


def shape(label: str, kind: str, *points: tuple[float, float], group: int | None = None) -> dict:
  return {
    "label": label,
    "shape_type": kind,
    "points": [list(point) for point in points],
    "group_id": group,
  }


def write_masks(folder: Path) -> np.ndarray:
  """A binary PNG, and the picture's own PNG with three numbers; gives the numbers."""
  (folder / "pngs" / "sub").mkdir(parents=True)
  numbers = np.random.default_rng(3).choice(np.asarray([0, 1, 2, 200], np.uint8), SIZE)
  indexed = Image.fromarray(numbers, "P")
  indexed.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
  indexed.save(folder / "pngs/sub/a.png")
  Image.fromarray(numbers == 2).save(folder / "pngs/one bit.png")
  Image.fromarray(np.uint8(255) * (numbers > 1)).save(folder / "pngs/grey.png")
  Image.fromarray(numbers.astype(np.uint16) * 300).save(folder / "pngs/b.png")
  return numbers
