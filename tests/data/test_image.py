"""Resizing, patches and decoding; `tests/parity/test_image.py` compares with transformers."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tests.pictures import encoded, picture
from vrt_jax.config import ImageConfig
from vrt_jax.data import image

CONFIG = ImageConfig(  # the reference's
  patch_size=16,
  min_pixels=512 * 784,
  max_pixels=2048 * 784,
  inference_factor_px=28,
  grounding_size_px=1024,
)
SMALL = dataclasses.replace(CONFIG, min_pixels=64 * 64, max_pixels=160 * 160)


def jpeg(size: tuple[int, int] = (97, 61), **options: object) -> bytes:
  return encoded(picture(*size), "JPEG", **options)


@pytest.mark.parametrize(
  "size, inference_grid, training_grid",
  [((640, 427), (1, 32, 50), (1, 34, 50)), ((97, 61), (1, 34, 50), (1, 32, 50))],
)
def test_grids(size, inference_grid, training_grid):
  pil = picture(*size)
  patches, grid = image.mllm_patches(pil, CONFIG, inference=True)
  assert grid == inference_grid
  assert patches.shape == (grid[1] * grid[2], 3 * 2 * 16 * 16)
  assert image.num_visual_tokens(grid, 2) == grid[1] * grid[2] // 4
  assert image.mllm_patches(pil, CONFIG, inference=False)[1] == training_grid


def test_no_first_resize():
  config = dataclasses.replace(SMALL, inference_factor_px=0)
  pil = picture(97, 61)
  ours, _ = image.mllm_patches(pil, config, inference=True)
  np.testing.assert_array_equal(ours, image.mllm_patches(pil, config, inference=False)[0])
  assert not np.array_equal(ours, image.mllm_patches(pil, SMALL, inference=True)[0])


def test_smart_resize():
  limits = (CONFIG.min_pixels, CONFIG.max_pixels)
  assert image.smart_resize(427, 640, 32, *limits) == (544, 800)
  assert image.smart_resize(720, 784, 32, *limits) == (704, 768)  # 22.5 and 24.5 round to even
  assert image.smart_resize(10, 1000, 28, 4 * 784, 16384 * 784) == (28, 560)
  first = image.smart_resize(10, 1000, 28, 4 * 784, 16384 * 784, at_least_factor=True)
  assert first == (28, 1008)
  assert image.smart_resize(1, 200, 32, *limits) == (64, 8960)
  with pytest.raises(ValueError, match=r"^aspect ratio: 201x1 is 201, above 200"):
    image.smart_resize(1, 201, 32, *limits)
  with pytest.raises(ValueError, match=r"^empty image: 5x0 pixels"):
    image.smart_resize(0, 5, 32, *limits)


def test_patchify_of_a_counting_picture():
  config = ImageConfig(patch_size=1, merge_size=2, temporal_patch_size=2)
  pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
  patches, grid = image.patchify(np.stack([pixels, pixels + 100, pixels + 200], -1), config)
  assert grid == (1, 4, 4)
  assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
  assert patches[1].tolist() == [1, 1, 101, 101, 201, 201]
  with pytest.raises(ValueError, match="4x3 pixels are not multiples of 2"):
    image.patchify(np.zeros((3, 4, 3), np.uint8), config)


def test_grounding_image():
  pil = picture(97, 61)
  square = image.grounding_image(pil, 64)
  assert square.shape == (64, 64, 3) and square.dtype == np.uint8
  np.testing.assert_array_equal(square, np.asarray(pil.resize((64, 64), Image.Resampling.BICUBIC)))


def test_decode_image():
  assert image.decode_image(jpeg()).size == (97, 61)
  exif = Image.Exif()
  exif[0x0112] = 6  # rotate by 90 degrees
  assert image.decode_image(jpeg(exif=exif)).size == (97, 61)
  for mode in ("L", "RGBA", "P", "I;16"):
    file = io.BytesIO()
    Image.new(mode, (4, 3)).save(file, "PNG")
    assert image.decode_image(file.getvalue()).mode == "RGB"


def test_corrupt_images():
  png = io.BytesIO()
  picture(97, 61).save(png, "PNG")
  whole = [jpeg(), png.getvalue()]
  for data in [b"", b"junk", whole[0][:20], *(w[: len(w) // 2] for w in whole)]:
    with pytest.raises(ValueError, match=r"^corrupt image: \d+ bytes: ") as caught:
      image.decode_image(data)
    assert "\n" not in str(caught.value)
