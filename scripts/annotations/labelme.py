"""LabelMe: a JSON file a picture with polygons, rectangles and circles, found by label or place."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from scripts.annotations.regions import (
  Size,
  circle_mask,
  points_of,
  polygon_mask,
  rectangle_mask,
  require_size,
)

SHAPE_TYPES = ("polygon", "rectangle", "circle")


class LabelmeAnnotations:
  """The shapes of a folder of LabelMe files; `a/b.jpg` has its shapes in `a/b.json`.

  Captions are labels.
  """

  def __init__(self, folder: Path):
    self._folder = folder

  def find(self, image: str, size: Size, reference: object) -> tuple[Bool[np.ndarray, "Y X"], str]:
    """(mask, caption) of the shapes with a label, or of the shape at a place in the list.

    Shapes with the same label are one object where they have the same group_id. Raises ValueError
    where nothing or several objects match, the shapes are for another size, or are malformed.
    """
    path = self._folder / Path(image).with_suffix(".json")
    shapes = _shapes(path, size)
    try:
      chosen = _choose(shapes, reference)
      mask = np.zeros(size, bool)
      for shape in chosen:
        mask |= _shape_mask(shape, size)
    except ValueError as error:
      raise ValueError(f"{path.name}: {error}") from None
    return mask, str(chosen[0].get("label", ""))


def _shapes(path: Path, size: Size) -> list[dict]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(f"{path} does not exist") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  shapes = content.get("shapes") if isinstance(content, dict) else None
  if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
    raise ValueError(f"{path} is not a LabelMe file: it has no list of shapes")
  stated = content.get("imageHeight"), content.get("imageWidth")
  require_size(path.name, stated, size)
  return shapes


def _choose(shapes: list[dict], reference: object) -> list[dict]:
  if isinstance(reference, bool) or not isinstance(reference, int | str):
    raise ValueError(f"{reference!r} is neither a label nor the place of a shape, from 0")
  if isinstance(reference, int):
    if not 0 <= reference < len(shapes):
      raise ValueError(f"there is no shape {reference}, the places are 0 to {len(shapes) - 1}")
    return [shapes[reference]]
  places = [i for i, shape in enumerate(shapes) if shape.get("label") == reference]
  if not places:
    labels = sorted({str(shape.get("label")) for shape in shapes})
    raise ValueError(f"there is no label {reference!r}, the labels are {', '.join(labels)}")
  groups = {shapes[i].get("group_id") for i in places}
  if len(places) > 1 and (len(groups) > 1 or None in groups):
    raise ValueError(f"{reference!r} names several objects: give a place, one of {places}")
  return [shapes[i] for i in places]


def _shape_mask(shape: dict, size: Size) -> Bool[np.ndarray, "Y X"]:
  kind = shape.get("shape_type", "polygon")
  points = points_of(shape.get("points"))
  if kind == "polygon":
    return polygon_mask([[value for point in points for value in point]], size)
  if kind == "rectangle":
    return rectangle_mask(points, size)
  if kind == "circle":
    return circle_mask(points, size)
  raise ValueError(f"shape_type {kind!r} is not one of {', '.join(SHAPE_TYPES)}")
