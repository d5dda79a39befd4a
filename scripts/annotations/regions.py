"""Shapes of annotation tools -> masks.

Polygons are rasterised by COCO's own code (pycocotools, rleFrPoly); rectangles and circles hold the
pixels whose centres they hold. Coordinates are (x, y) in pixels from the upper left corner of the
picture; what lies outside the picture is cut off.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco

from vrt_jax.ops.masks import decode_rle

Size = tuple[int, int]
"""(height, width) of the picture in pixels."""
Point = tuple[float, float]


def polygon_mask(polygons: Sequence[Any], size: Size) -> Bool[np.ndarray, "Y X"]:
  """The union of polygons [x0, y0, x1, y1, ..] of at least three points.

  Raises ValueError for other lists.
  """
  if not polygons:
    raise ValueError("an empty list of polygons")
  for polygon in polygons:
    if (
      not isinstance(polygon, list)
      or len(polygon) < 6
      or len(polygon) % 2
      or not all(_is_number(value) for value in polygon)
    ):
      raise ValueError("a polygon is a list [x0, y0, x1, y1, ..] of at least three points")
  merged = coco.merge(coco.frPyObjects([list(map(float, p)) for p in polygons], *size))
  return decode_rle(merged)


def rectangle_mask(corners: Sequence[Point], size: Size) -> Bool[np.ndarray, "Y X"]:
  """The rectangle between two opposite corners; ValueError for another number of points."""
  if len(corners) != 2:
    raise ValueError(f"a rectangle has 2 points, not {len(corners)}")
  (x0, x1), (y0, y1) = (sorted(values) for values in zip(*corners, strict=True))
  x, y = _pixel_centres(size)
  return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def circle_mask(points: Sequence[Point], size: Size) -> Bool[np.ndarray, "Y X"]:
  """The circle given by its centre and a point on it; ValueError for another number of points."""
  if len(points) != 2:
    raise ValueError(f"a circle has 2 points, its centre and one on it, not {len(points)}")
  centre_x, centre_y = points[0]
  radius = math.dist(*points)
  x, y = _pixel_centres(size)
  return (x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2


def require_size(name: str, stated: tuple[object, object], size: Size) -> None:
  """Raises ValueError unless `stated` (height, width) of `name` is the picture's size."""
  if stated == size:
    return
  turned = stated == size[::-1]
  hint = ": save the picture upright, EXIF orientation is ignored" if turned else ""
  raise ValueError(
    f"{name} has {stated[1]}x{stated[0]} pixels, the picture {size[1]}x{size[0]}{hint}"
  )


def points_of(value: object) -> list[Point]:
  """A JSON list of [x, y] pairs; ValueError for anything else."""
  if isinstance(value, list) and all(
    isinstance(point, list) and len(point) == 2 and all(_is_number(v) for v in point)
    for point in value
  ):
    return [(float(x), float(y)) for x, y in value]
  raise ValueError("points is not a list of [x, y]")


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pixel_centres(size: Size) -> tuple[np.ndarray, np.ndarray]:
  """x [1, X] and y [Y, 1] of the pixels' centres."""
  height, width = size
  return np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
