"""Masks as PNG files: one binary picture an object, or one picture whose values number objects."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image

from scripts.annotations.regions import Size, require_size


class PngMasks:
  """The masks of a folder.

  The text "a/cup.png" names a binary mask: what is not zero is inside. The number 3 names the
  pixels of value 3 (of a palette: of index 3) in the picture's own PNG, `a/b.png` for `a/b.jpg`.
  Captions are the names of binary masks, without folder and ending.
  """

  def __init__(self, folder: Path):
    self._folder = folder

  def find(self, image: str, size: Size, reference: object) -> tuple[Bool[np.ndarray, "Y X"], str]:
    """(mask, caption); raises ValueError where the file or the value is missing or not usable."""
    if isinstance(reference, bool) or not isinstance(reference, int | str):
      raise ValueError(f"{reference!r} is neither a mask file nor a value of the picture's PNG")
    if isinstance(reference, str):
      return _read(self._folder / reference, size) != 0, Path(reference).stem
    path = self._folder / Path(image).with_suffix(".png")
    values = _read(path, size)
    if reference < 1 or not (values == reference).any():
      there = ", ".join(str(v) for v in np.unique(values)[:20] if v)
      raise ValueError(f"no pixel of {path.name} has the value {reference}, there are {there}")
    return values == reference, ""


def _read(path: Path, size: Size) -> Shaped[np.ndarray, "Y X"]:
  try:
    with Image.open(path) as picture:
      if picture.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"{path.name} has colours ({picture.mode}): save it in grey or indexed")
      values = np.asarray(picture)
  except FileNotFoundError:
    raise ValueError(f"{path} does not exist") from None
  except (OSError, SyntaxError) as error:
    raise ValueError(f"{path} is not a picture: {error}") from None
  require_size(path.name, values.shape, size)
  return values
