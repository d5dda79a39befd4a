"""COCO instances JSON: polygons and run-length encodings, found by annotation id."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from scripts.annotations.regions import Size, polygon_mask, require_size
from vrt_jax.ops.masks import decode_rle


class CocoAnnotations:
  """The annotations of a COCO file; captions are category names.

  Raises ValueError where the file is not of that form.
  """

  def __init__(self, path: Path):
    try:
      content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"{path} is not JSON: {error}") from None
    images, annotations = (_list(content, name, path) for name in ("images", "annotations"))
    categories = _list(content, "categories", path)
    try:
      self._names = {category["id"]: str(category["name"]) for category in categories}
      self._images = {str(image["file_name"]): image for image in images}
      self._annotations = {annotation["id"]: annotation for annotation in annotations}
      self._file_names = {image["id"]: str(image["file_name"]) for image in images}
    except (KeyError, TypeError) as error:
      raise ValueError(f"{path}: an entry without {error}, or not an object") from None
    if len(self._annotations) < len(annotations):
      raise ValueError(f"{path}: several annotations have the same id")

  def file_name(self, image_id: object) -> str:
    """Of an image; ValueError where there is none with this id."""
    if image_id not in self._file_names:
      raise ValueError(f"the COCO file has no image {image_id!r}")
    return self._file_names[image_id]

  def find(self, image: str, size: Size, reference: object) -> tuple[Bool[np.ndarray, "Y X"], str]:
    """(mask, caption) of the annotation with an id, in the picture `image` of `size`.

    Raises ValueError where there is none, it belongs to another picture, or is malformed.
    """
    if not isinstance(reference, int) or isinstance(reference, bool):
      raise ValueError(f"{reference!r} is not an annotation id (an integer)")
    if image not in self._images:
      raise ValueError(f"the COCO file has no image with file_name {image!r}")
    if reference not in self._annotations:
      raise ValueError(f"there is no annotation {reference}")
    annotation = self._annotations[reference]
    owner = self._file_names.get(annotation.get("image_id"))
    if owner != image:
      raise ValueError(f"annotation {reference} belongs to {owner!r}")
    stated = self._images[image].get("height"), self._images[image].get("width")
    require_size("its entry in the COCO file", stated, size)
    try:
      mask = _mask(annotation.get("segmentation"), size)
    except ValueError as error:
      raise ValueError(f"annotation {reference}: {error}") from None
    category = annotation.get("category_id")
    if category not in self._names:
      raise ValueError(f"annotation {reference} is of category {category}, which is not listed")
    return mask, self._names[category]


def _mask(segmentation: object, size: Size) -> Bool[np.ndarray, "Y X"]:
  if isinstance(segmentation, list):
    return polygon_mask(segmentation, size)
  if not isinstance(segmentation, Mapping):
    raise ValueError("segmentation is neither a list of polygons nor an RLE")
  return decode_rle(segmentation)


def _list(content: Any, name: str, path: Path) -> list:
  if not isinstance(content, dict) or not isinstance(content.get(name), list):
    raise ValueError(f"{path} is not a COCO instances file: it has no list {name!r}")
  return content[name]
