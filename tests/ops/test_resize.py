"""Resizing equals torch's F.interpolate, up and down, on odd and even sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vrt_jax.ops.resize import (
  bicubic_matrix,
  bilinear_matrix,
  resize_bicubic,
  resize_bilinear,
  resize_bilinear_numpy,
  resize_nearest_numpy,
)

SIZES = [
  ((7, 7), (48, 32)),
  ((13, 9), (5, 31)),
  ((16, 16), (7, 8)),
  ((6, 5), (6, 5)),
  ((1, 3), (4, 2)),
]


def _image(size, seed=0):
  return np.random.default_rng(seed).normal(size=(2, 3, *size)).astype(np.float32)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_bilinear_equals_torch(size, target):
  x = _image(size)
  want = F.interpolate(torch.from_numpy(x), target, mode="bilinear", align_corners=False)
  np.testing.assert_allclose(resize_bilinear(jnp.asarray(x), target), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_bicubic_equals_torch(size, target):
  x = _image(size)
  want = F.interpolate(torch.from_numpy(x), target, mode="bicubic", align_corners=False)
  np.testing.assert_allclose(resize_bicubic(jnp.asarray(x), target), want, rtol=1e-5, atol=1e-5)


def test_corner_aligned_and_antialiased_differ():
  x = torch.from_numpy(_image((13, 9)))
  ours = np.asarray(resize_bilinear(jnp.asarray(x.numpy()), (26, 18)))
  corners = F.interpolate(x, (26, 18), mode="bilinear", align_corners=True).numpy()
  assert np.abs(ours - corners).max() > 0.1
  ours = np.asarray(resize_bilinear(jnp.asarray(x.numpy()), (5, 4)))
  smooth = F.interpolate(x, (5, 4), mode="bilinear", antialias=True).numpy()
  assert np.abs(ours - smooth).max() > 0.1


@pytest.mark.parametrize("make", [bilinear_matrix, bicubic_matrix])
def test_weights_of_a_sample_sum_to_one(make):
  np.testing.assert_allclose(make(7, 19).sum(axis=1), 1.0, atol=1e-6)
  np.testing.assert_allclose(make(8, 8), np.eye(8), atol=1e-6)


def test_dtype_of_the_input_is_kept():
  x = jnp.ones((4, 6), jnp.bfloat16)
  assert resize_bilinear(x, (8, 3)).dtype == jnp.bfloat16
  assert resize_bicubic(x, (8, 3)).shape == (8, 3)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(
  ("size", "target"), [*SIZES, ((427, 640), (256, 256)), ((97, 61), (256, 256))]
)
def test_nearest_equals_torch(size, target, mode):
  mask = (_image(size) > 0).astype(np.uint8)
  want = F.interpolate(torch.from_numpy(mask).float(), target, mode=mode).numpy()
  got = resize_nearest_numpy(mask, target, mode)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, want)


def test_nearest_is_not_half_pixel():
  mask = (_image((427, 640)) > 0).astype(np.uint8)
  exact = F.interpolate(torch.from_numpy(mask).float(), (256, 256), mode="nearest-exact").numpy()
  assert (resize_nearest_numpy(mask, (256, 256)) != exact).mean() > 0.1


@pytest.mark.parametrize(("mode", "moved_px"), [("nearest", 3.5), ("nearest-exact", -0.5)])
def test_how_far_nearest_moves_masks(mode, moved_px):
  """Masks made small (cells of 8 pixels) and large again: half a cell, or half a pixel."""
  moved = []
  for start in range(8):
    mask = np.zeros((128, 128), np.uint8)
    mask[24 + start : 48 + start, 40 + start : 96 + start] = 1
    small = resize_nearest_numpy(mask, (16, 16), mode).astype(np.float32)
    large = resize_bilinear_numpy(small, (128, 128)) > 0.5
    moved.append(
      [a.mean() - b.mean() for a, b in zip(large.nonzero(), mask.nonzero(), strict=True)]
    )
  np.testing.assert_allclose(np.mean(moved, axis=0), moved_px, atol=0.1)


def test_resize_nearest_takes_floor_indices():
  masks = np.arange(5)[None, :, None] * np.ones((1, 1, 3), int)
  assert resize_nearest_numpy(masks, (4, 3))[0, :, 0].tolist() == [0, 1, 2, 3]
  assert resize_nearest_numpy(masks, (7, 3))[0, :, 0].tolist() == [0, 0, 1, 2, 2, 3, 4]
