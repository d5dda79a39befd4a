"""Boxes of a picture to masks: filled, or segmented by SAM 2's box prompt."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float
from PIL import Image

from eval.boxes import Box
from vrt_jax.model_directory import load_sam2
from vrt_jax.models.sam2.model import ImageFeatures, MaskOutput
from vrt_jax.ops.resize import resize_bilinear_numpy

BATCH_SIZES = (4, 16, 64)
"""Boxes of a picture are decoded together, padded to one of these; more in several groups."""


def filled_masks(boxes: Sequence[Box], image_size: tuple[int, int]) -> Bool[np.ndarray, "M Y X"]:
  """The boxes themselves as masks of (height, width), to the nearest edges of pixels.

  A box thinner than a pixel has one.

  >>> filled_masks([(0.25, 0.0, 0.75, 0.5)], (2, 4)).astype(int).tolist()
  [[[0, 1, 1, 0], [0, 0, 0, 0]]]
  """
  masks = np.zeros((len(boxes), *image_size), bool)
  for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
    mask[_pixels(y0, y1, image_size[0]), _pixels(x0, x1, image_size[1])] = True
  return masks


def _pixels(low: float, high: float, size: int) -> slice:
  first = min(round(low * size), size - 1)
  return slice(first, max(first + 1, round(high * size)))


class BoxSegmenter:
  """SAM 2 prompted with boxes, as SAM2ImagePredictor of sam2 with multimask_output False.

  Pictures are resized by Pillow's bilinear filter, which rounds to bytes where torchvision's does
  not; logits go from stride 4 to the picture's size in one bilinear step.
  """

  def __init__(self, path: str):
    """Reads a model directory, of a whole model or of SAM 2 alone; ValueError for others."""
    model = load_sam2(path)
    graphdef, self._params = nnx.split(model)
    self.image_size_px = model.prompt_encoder.image_size_px

    @jax.jit
    def encode(params: nnx.State, image: jax.Array) -> ImageFeatures:
      return nnx.merge(graphdef, params).encode_image(image)

    @jax.jit
    def decode(params: nnx.State, features: ImageFeatures, boxes: jax.Array) -> MaskOutput:
      return nnx.merge(graphdef, params).decode_boxes(features, boxes)

    self._encode, self._decode = encode, decode

  def masks(
    self, picture: Image.Image, boxes: Sequence[Box]
  ) -> tuple[Bool[np.ndarray, "M Y X"], list[float]]:
    """(masks at the size of the RGB picture, predicted IoUs), one a box; one encoding a picture."""
    image_size = (picture.height, picture.width)
    if not boxes:
      return np.zeros((0, *image_size), bool), []
    side = self.image_size_px
    square = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
    features = self._encode(self._params, square[None])
    masks, scores = [], []
    pixels = np.asarray(boxes, np.float32) * side
    for start in range(0, len(boxes), BATCH_SIZES[-1]):
      group = pixels[start : start + BATCH_SIZES[-1]]
      out = self._decode(self._params, features, jnp.asarray(padded(group))[None])
      for logits in np.asarray(out.low_res_masks[0, : len(group)]):
        masks.append(resize_bilinear_numpy(logits, image_size) > 0)
      scores += np.asarray(out.iou_pred[0, : len(group)]).tolist()
    return np.stack(masks), scores


def padded(boxes: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "Mp 4"]:
  """Boxes with rows of zeros up to the next of BATCH_SIZES, of which the largest holds them.

  >>> padded(np.ones((5, 4), np.float32)).shape
  (16, 4)
  """
  size = next(size for size in BATCH_SIZES if size >= len(boxes))
  return np.pad(boxes, ((0, size - len(boxes)), (0, 0)))
