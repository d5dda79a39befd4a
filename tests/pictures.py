"""Pictures for tests, and the reference's way from a picture to the language model's patches."""

import io
import math

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vrt_jax.config import ImageConfig

FIRST_RESIZE_FACTOR = 28
FIRST_RESIZE_PIXELS = (4 * 28**2, 16384 * 28**2)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
  """Smooth colours with noise."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
  pixels = np.asarray(coarse.resize((width, height))).astype(np.int16)
  noisy = pixels + rng.integers(-20, 21, pixels.shape)
  return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
  """The bytes of a picture file."""
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def hf_processor(config: ImageConfig) -> Qwen2VLImageProcessorPil:
  """transformers' image processor with the same settings."""
  return Qwen2VLImageProcessorPil(
    patch_size=config.patch_size,
    merge_size=config.merge_size,
    temporal_patch_size=config.temporal_patch_size,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    min_pixels=config.min_pixels,
    max_pixels=config.max_pixels,
  )


def first_resize(image: Image.Image) -> Image.Image:
  """What qwen_vl_utils does to a picture at inference, before the processor sees it.

  Both sides to the nearest multiple of 28, or, where the area leaves its limits, all the way down
  or up to them; Pillow's default filter.
  """
  area, step = image.width * image.height, FIRST_RESIZE_FACTOR
  width, height = (max(step, step * round(side / step)) for side in image.size)
  low, high = FIRST_RESIZE_PIXELS
  if width * height > high:
    width, height = (step * math.floor(s * math.sqrt(high / area) / step) for s in image.size)
  elif width * height < low:
    width, height = (step * math.ceil(s * math.sqrt(low / area) / step) for s in image.size)
  return image.resize((width, height))
