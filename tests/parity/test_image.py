"""Pictures of training and of inference against transformers' image processor, bit for bit.

The first resize of inference belongs to qwen_vl_utils, whose import needs torchvision; it is
written out in `tests.pictures.first_resize`. Its sizes of the photographs and of 5000x4000 here
were printed by `fetch_image` of qwen-vl-utils 0.0.14, the others follow from its rule.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from tests.parity.errors import max_error
from tests.pictures import first_resize, hf_processor, picture
from vrt_jax.config import ImageConfig, VisionConfig
from vrt_jax.data import image
from vrt_jax.data.records import read_eval_records
from vrt_jax.models.qwen3_vl.vision import PatchEmbed
from vrt_jax.models.sam2.model import normalize_image

CONFIG = ImageConfig(  # the reference's
  min_pixels=512 * 784, max_pixels=2048 * 784, inference_factor_px=28, grounding_size_px=1024
)
SMALL = dataclasses.replace(CONFIG, min_pixels=64 * 64, max_pixels=160 * 160)


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[Image.Image]:
  records = read_eval_records(str(shared_data / "photos/photos_eval.tfrecord"))
  pictures = sorted({record.image for record in records})
  assert len(pictures) == 3
  return [image.decode_image(data) for data in pictures]


def processed(pil: Image.Image, config: ImageConfig, inference: bool) -> tuple[np.ndarray, list]:
  """The reference's (pixel_values, grid)."""
  out = hf_processor(config)(images=[first_resize(pil) if inference else pil], return_tensors="np")
  return out["pixel_values"], out["image_grid_thw"].tolist()


def assert_equal(pil: Image.Image, config: ImageConfig, inference: bool):
  expected, expected_grid = processed(pil, config, inference)
  patches, grid = image.mllm_patches(pil, config, inference)
  assert patches.dtype == np.uint8
  assert [list(grid)] == expected_grid
  values = image.normalize_patches(patches)
  assert values.dtype == np.float32
  np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("size", [(640, 427), (97, 61)])
def test_patches(size, inference):
  assert_equal(picture(*size), CONFIG, inference)


@pytest.mark.parametrize("inference", [False, True])
def test_patches_of_random_sizes(inference):
  rng = np.random.default_rng(1)
  for seed in range(12):
    width, height = (int(side) for side in rng.integers(1, 400, 2))
    assert_equal(picture(width, height, seed), SMALL, inference)


@pytest.mark.parametrize("inference", [False, True])
def test_patches_of_photographs(photographs, inference):
  for pil in photographs:
    assert_equal(pil, CONFIG, inference)


def test_the_two_resizes_of_inference_are_not_one(photographs):
  for pil in photographs:
    training, grid = image.mllm_patches(pil, CONFIG, inference=False)
    expected, expected_grid = processed(pil, CONFIG, inference=True)
    assert [list(grid)] == expected_grid  # for these; test_sizes_of_the_first_resize has others
    differs = image.normalize_patches(training) != expected
    assert differs.mean() > 0.1


@pytest.mark.parametrize(
  ("size", "resized"),
  [
    ((1800, 1200), (1792, 1204)),
    ((800, 534), (812, 532)),
    ((2250, 1500), (2240, 1512)),
    ((5000, 4000), (4004, 3192)),  # above the area limit
    ((640, 427), (644, 420)),
    ((10, 1000), (28, 1008)),
  ],
)
def test_sizes_of_the_first_resize(size, resized):
  factor, limits = CONFIG.inference_factor_px, (4 * 784, 16384 * 784)
  assert (CONFIG.inference_min_pixels, CONFIG.inference_max_pixels) == limits
  width, height = size
  ours = image.smart_resize(height, width, factor, *limits, at_least_factor=True)
  assert ours[::-1] == resized == first_resize(Image.new("RGB", size)).size


def test_another_order_of_patches_fails():
  pil = picture(97, 61)
  expected, _ = processed(pil, SMALL, inference=False)
  patches, (_, rows, columns) = image.mllm_patches(pil, SMALL, inference=False)
  blocks = patches.reshape(rows // 2, columns // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4)
  raster = image.normalize_patches(blocks.reshape(rows * columns, -1))
  assert (raster != expected).mean() > 0.1


def test_another_filter_fails():
  pil = picture(97, 61)
  expected, _ = processed(pil, SMALL, inference=False)
  _, (_, rows, columns) = image.mllm_patches(pil, SMALL, inference=False)
  bilinear = pil.resize((16 * columns, 16 * rows), Image.Resampling.BILINEAR)
  patches, _ = image.patchify(np.asarray(bilinear), SMALL)
  assert (image.normalize_patches(patches) != expected).mean() > 0.1


def test_bytes_normalised_on_the_device_equal_the_processor_s_floats():
  """What the tower computes from uint8, seen through an identity as patch embedding."""
  pil = picture(64, 64)
  config = dataclasses.replace(SMALL, patch_size=4, min_pixels=64 * 64, max_pixels=64 * 64)
  expected, _ = processed(pil, config, inference=False)
  patches, _ = image.mllm_patches(pil, config, inference=False)
  width = patches.shape[1]
  embed = PatchEmbed(VisionConfig(patch_size=4, hidden_size=width), nnx.Rngs(0))
  embed.proj.weight[...], embed.proj.bias[...] = jnp.eye(width), jnp.zeros(width)
  with jax.default_matmul_precision("highest"):
    ours = embed(jnp.asarray(patches)[None], jnp.float32)[0]
  assert max_error(ours, expected) < 2e-7
  assert max_error((patches.astype(np.float32) - 128) / 128, expected) > 1e-3


def test_grounding_image_of_photographs(photographs):
  """Pillow's default filter straight to 1024 x 1024, ImageNet's mean and deviation in float32."""
  mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
  for pil in photographs:
    square = image.grounding_image(pil, CONFIG.grounding_size_px)
    theirs = np.asarray(pil.resize((1024, 1024)))
    np.testing.assert_array_equal(square, theirs)
    pixels = (torch.tensor(theirs).float() / 255 - mean) / std
    assert max_error(normalize_image(jnp.asarray(square)), pixels) < 1e-6
    side = 1024 / max(pil.size)
    letterboxed = Image.new("RGB", (1024, 1024))
    letterboxed.paste(pil.resize((round(pil.width * side), round(pil.height * side))))
    assert (np.asarray(letterboxed) != theirs).mean() > 0.5
