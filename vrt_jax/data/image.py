"""Pictures: decoding, the language model's patches and SAM 2's square input.

The two resizes, the patch order and the normalisation follow qwen_vl_utils (fetch_image), HF's
Qwen2VLImageProcessorPil and Sa2VA's DirectResize; pixels stay uint8 until the device.
"""

import io
import math
import struct

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vrt_jax.config import ImageConfig

MAX_ASPECT_RATIO = 200

Grid = tuple[int, int, int]
"""Patches in time, rows and columns."""


def decode_image(data: bytes) -> Image.Image:
  """The fully decoded RGB picture of JPEG, PNG, .. bytes; EXIF orientation is ignored.

  Raises ValueError("corrupt image: ...") for anything that does not decode to the last row.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.load()
      return image if image.mode == "RGB" else image.convert("RGB")
  except (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
  ) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"corrupt image: {len(data)} bytes: {reason}") from error


def smart_resize(
  height: int,
  width: int,
  factor: int,
  min_pixels: int,
  max_pixels: int,
  at_least_factor: bool = False,
) -> tuple[int, int]:
  """(height, width) as multiples of `factor`, area within the limits, about the same aspect.

  Sides round half to even (Python's `round`). With `at_least_factor` a side that would round to
  0 becomes `factor` before the limits are looked at: qwen_vl_utils does so, HF's processor does
  not (Qwen2VLImageProcessor, smart_resize).

      smart_resize(427, 640, 32, 401408, 1605632) -> (544, 800)

  Raises ValueError for an empty picture and for an aspect ratio above 200.
  """
  if min(height, width) < 1:
    raise ValueError(f"empty image: {width}x{height} pixels")
  ratio = max(height, width) / min(height, width)
  if ratio > MAX_ASPECT_RATIO:
    raise ValueError(f"aspect ratio: {width}x{height} is {ratio:.0f}, above {MAX_ASPECT_RATIO}")
  rows, columns = (round(side / factor) * factor for side in (height, width))
  if at_least_factor:
    rows, columns = max(factor, rows), max(factor, columns)
  if rows * columns > max_pixels:
    shrink = math.sqrt(height * width / max_pixels)
    rows, columns = (
      max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
    )
  elif rows * columns < min_pixels:
    grow = math.sqrt(min_pixels / (height * width))
    rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
  return rows, columns


def resize_uint8(image: Image.Image, height: int, width: int) -> Image.Image:
  """Pillow's bicubic resize of an RGB picture, uint8 in and out."""
  return image.resize((width, height), resample=Image.Resampling.BICUBIC)


def patchify(image: UInt8[np.ndarray, "Y X 3"], config: ImageConfig) -> tuple[np.ndarray, Grid]:
  """Patches uint8 [P, C] and their grid (1, rows, columns).

  Patches are ordered [rows / merge, columns / merge, merge, merge], values of a patch
  [3, temporal_patch_size, patch_size, patch_size] with the frame repeated. Source: HF
  Qwen2VLImageProcessorPil.patchify. Raises ValueError where sides do not divide.
  """
  patch, merge, frames = config.patch_size, config.merge_size, config.temporal_patch_size
  height, width, channels = image.shape
  if height % (patch * merge) or width % (patch * merge):
    raise ValueError(f"{width}x{height} pixels are not multiples of {patch * merge}")
  rows, columns = height // patch, width // patch
  blocks = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, channels)
  blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows/m, columns/m, m, m, 3, patch, patch]
  blocks = blocks.reshape(rows * columns, channels, 1, patch, patch)
  patches = np.broadcast_to(blocks, (rows * columns, channels, frames, patch, patch))
  return patches.reshape(rows * columns, -1), (1, rows, columns)


def normalize_patches(patches: UInt8[np.ndarray, "P C"]) -> Float32[np.ndarray, "P C"]:
  """uint8 to about -1 .. 1 with mean = std = 0.5, bit for bit HF's rescale and normalize."""
  values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
  half = np.float32(0.5)
  return ((values - half) / half)[patches]


def mllm_patches(
  image: Image.Image, config: ImageConfig, inference: bool
) -> tuple[UInt8[np.ndarray, "P C"], Grid]:
  """The language model's view of an RGB picture: (patches, grid), as `patchify`.

  `inference` adds the first resize of qwen_vl_utils, which training does not have.
  Raises ValueError for an empty picture and for an aspect ratio above 200.
  """
  if inference and config.inference_factor_px:
    first = smart_resize(
      image.height,
      image.width,
      config.inference_factor_px,
      config.inference_min_pixels,
      config.inference_max_pixels,
      at_least_factor=True,
    )
    image = resize_uint8(image, *first)
  factor = config.patch_size * config.merge_size
  size = smart_resize(image.height, image.width, factor, config.min_pixels, config.max_pixels)
  return patchify(np.asarray(resize_uint8(image, *size)), config)


def num_visual_tokens(grid: Grid, merge_size: int) -> int:
  """Tokens of a picture after merging blocks of merge_size x merge_size patches."""
  return math.prod(grid) // merge_size**2


def grounding_image(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
  """SAM 2's view of an RGB picture: Pillow's default (bicubic) resize to a square, aspect lost.

  Source: DirectResize of Sa2VA.
  """
  return np.asarray(image.resize((size, size)))
