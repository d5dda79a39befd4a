"""import_data: the masks of every format equal an independent rasterisation."""

from pathlib import Path

import numpy as np
import pytest

from tests.own_data import (
  HEIGHT,
  SIZE,
  STAR,
  TRIANGLE,
  WIDTH,
  entry,
  run,
  shape,
  write_coco,
  write_labelme,
  write_masks,
  write_pictures,
)
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.sources import train_source
from vrt_jax.ops.masks import decode_rle


def inside(polygon: list[float]) -> np.ndarray:
  """Pixels whose centre a ray to the left leaves an odd number of times."""
  points = np.asarray(polygon).reshape(-1, 2)
  y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
  odd = np.zeros(SIZE, bool)
  for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
    crosses = (y0 > y) != (y1 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
      odd ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
  return odd


def near_edge(polygon: list[float], distance: float) -> np.ndarray:
  """Pixels whose centre is within `distance` of the outline."""
  points = np.asarray(polygon).reshape(-1, 2)
  centres = np.stack(np.mgrid[:HEIGHT, :WIDTH][::-1], -1) + 0.5
  near = np.zeros(SIZE, bool)
  for a, b in zip(points, np.roll(points, -1, 0), strict=True):
    t = ((centres - a) @ (b - a) / ((b - a) @ (b - a))).clip(0, 1)
    near |= np.linalg.norm(centres - (a + t[..., None] * (b - a)), axis=-1) < distance
  return near


def assert_polygon(mask: np.ndarray, polygon: list[float]) -> None:
  """COCO draws an outline of its own width; one pixel away from it there is no doubt."""
  expected, doubtful = inside(polygon), near_edge(polygon, 1.0)
  np.testing.assert_array_equal(mask & ~doubtful, expected & ~doubtful)
  assert (expected & ~doubtful).sum() > 30


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
  mask = np.zeros(SIZE, bool)
  mask[y0:y1, x0:x1] = True
  return mask


@pytest.fixture
def folder(tmp_path) -> Path:
  return write_pictures(tmp_path)


def train_masks(path: Path) -> list[dict[str, np.ndarray]]:
  """The masks of each record by tag, with what the captions say."""
  records: list[TrainRecord] = list(train_source(path))
  return [
    {
      tag: decode_rle(info["segmentation"])
      for tag, info in r.annotation["original_annotation"]["objects_anns"].items()
    }
    for r in records
  ]


def captions(record: TrainRecord) -> dict[str, str]:
  objects = record.annotation["original_annotation"]["objects_anns"]
  return {tag: info["caption"] for tag, info in objects.items()}


def test_coco(folder):
  write_coco(folder)
  blob = np.random.default_rng(0).random(SIZE) < 0.4
  objects = {f"<obj{i}>": i for i in (10, 11, 12, 13)} | {"<obj5>": [10, 13]}
  entries = [entry(objects, captions={"<obj11>": "a net"}), entry({"<obj1>": 20}, image="b.png")]
  path = run(folder, "coco", entries, "coco.json")
  first, second = train_masks(path)
  boxes = rectangle(2, 3, 12, 9) | rectangle(20, 30, 56, 40)
  assert_polygon(first["<obj10>"], TRIANGLE)
  np.testing.assert_array_equal(first["<obj11>"], blob)
  np.testing.assert_array_equal(first["<obj12>"], blob)
  np.testing.assert_array_equal(first["<obj13>"], boxes)
  np.testing.assert_array_equal(first["<obj5>"], boxes | first["<obj10>"])
  assert set(second) == {"<obj1>"}
  source = train_source(path)
  assert captions(source[0])["<obj10>"] == "cup" and captions(source[0])["<obj11>"] == "a net"
  assert source.keys() == ["sub/a_0", "b_0"]
  assert source[0].image == (folder / "images/sub/a.jpg").read_bytes()


def test_a_polygon_that_crosses_itself_and_one_beyond_the_edges(folder):
  outside = [-20.0, 10.0, 30.0, -15.0, 80.0, 60.0]
  annotations = [
    {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [outside]},
    {"id": 2, "image_id": 1, "category_id": 3, "segmentation": [STAR]},
  ]
  write_coco(folder, annotations=annotations)
  (masks,) = train_masks(run(folder, "coco", [entry({"<obj1>": 1, "<obj2>": 2})], "coco.json"))
  assert_polygon(masks["<obj1>"], outside)
  assert_polygon(masks["<obj2>"], STAR)


def test_labelme(folder):
  triangle = [(TRIANGLE[i], TRIANGLE[i + 1]) for i in (0, 2, 4)]
  write_labelme(
    folder,
    shape("tent", "polygon", *triangle),
    shape("box", "rectangle", (30, 25), (10, 5)),
    shape("ball", "circle", (20.5, 18.5), (20.5, 25.5)),
    shape("shoes", "rectangle", (0, 0), (4, 4), group=1),
    shape("shoes", "rectangle", (50, 36), (56, 40), group=1),
    shape("twin", "rectangle", (1, 1), (3, 3)),
    shape("twin", "rectangle", (5, 1), (8, 3)),
  )
  names = ["tent", "box", "ball", "shoes", 6, [5, 6]]
  objects = {f"<obj{i}>": name for i, name in enumerate(names, 1)}
  path = run(folder, "labelme", [entry(objects)], "shapes")
  (masks,) = train_masks(path)
  assert_polygon(masks["<obj1>"], TRIANGLE)
  np.testing.assert_array_equal(masks["<obj2>"], rectangle(10, 5, 30, 25))
  ball = np.asarray([[np.hypot(x - 20, y - 18) <= 7 for x in range(WIDTH)] for y in range(HEIGHT)])
  np.testing.assert_array_equal(masks["<obj3>"], ball)
  np.testing.assert_array_equal(masks["<obj4>"], rectangle(0, 0, 4, 4) | rectangle(50, 36, 56, 40))
  np.testing.assert_array_equal(masks["<obj5>"], rectangle(5, 1, 8, 3))
  np.testing.assert_array_equal(masks["<obj6>"], rectangle(1, 1, 3, 3) | rectangle(5, 1, 8, 3))
  assert list(captions(train_source(path)[0]).values()) == [
    *("tent", "box", "ball", "shoes", "twin", "twin")
  ]


def test_masks(folder):
  numbers = write_masks(folder)
  objects = {"<obj1>": 200, "<obj2>": "one bit.png", "<obj3>": "grey.png", "<obj4>": [1, 2]}
  entries = [entry(objects), entry({"<obj1>": 60000}, image="b.png")]
  path = run(folder, "masks", entries, "pngs")
  first, second = train_masks(path)
  np.testing.assert_array_equal(first["<obj1>"], numbers == 200)
  np.testing.assert_array_equal(first["<obj2>"], numbers == 2)
  np.testing.assert_array_equal(first["<obj3>"], numbers > 1)
  np.testing.assert_array_equal(first["<obj4>"], (numbers == 1) | (numbers == 2))
  np.testing.assert_array_equal(second["<obj1>"], numbers == 200)
  assert captions(train_source(path)[0])["<obj2>"] == "one bit"
