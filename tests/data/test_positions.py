"""Host-side positions: patches in merge order, interpolation taps, M-RoPE ids."""

import doctest

import numpy as np
import pytest

from vrt_jax.data import positions
from vrt_jax.data.positions import mrope_position_ids, vision_layout, visual_index


def test_docstring_examples():
  results = doctest.testmod(positions)
  assert results.attempted >= 4
  assert not results.failed


def test_patches_in_merge_order():
  layout = vision_layout([(1, 2, 4)], 8, merge=2, side=4)
  expected = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
  assert layout.patch_positions.tolist() == expected


def test_segments_and_padding():
  layout = vision_layout([(1, 2, 2), (2, 2, 2)], 14, merge=2, side=3)
  assert layout.patch_segments.tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [0] * 2
  np.testing.assert_array_equal(layout.patch_positions[4:8], layout.patch_positions[8:12])
  assert not layout.pos_embed_weight[12:].any()
  assert layout.pos_embed_weight.dtype == np.float32


@pytest.mark.parametrize("h, w", [(2, 2), (4, 6), (10, 4), (8, 14)])
def test_taps_interpolate_with_aligned_corners(h, w):
  """A table that is linear in row and column is read back linearly from corner to corner."""
  side = 7
  layout = vision_layout([(1, h, w)], h * w, merge=2, side=side)
  rows, columns = np.divmod(np.arange(side * side), side)
  np.testing.assert_allclose(layout.pos_embed_weight.sum(-1), 1, atol=1e-6)
  for table, axis, size in ((rows, 0, h), (columns, 1, w)):
    values = (table[layout.pos_embed_index] * layout.pos_embed_weight).sum(-1)
    expected = np.linspace(0, side - 1, size)[layout.patch_positions[:, axis]]
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_layout_errors():
  with pytest.raises(ValueError, match="16 patches, more than 12"):
    vision_layout([(1, 4, 4)], 12, merge=2, side=4)
  with pytest.raises(ValueError, match="multiples of 2"):
    vision_layout([(1, 3, 4)], 12, merge=2, side=4)


def test_mrope_of_two_images():
  ids = np.array([1, 9, 9, 9, 9, 2, 9, 9, 3])
  position_ids, delta = mrope_position_ids(ids, [(1, 4, 4), (1, 2, 4)], 9, 2)
  assert position_ids.tolist() == [
    [0, 1, 1, 1, 1, 3, 4, 4, 6],
    [0, 1, 1, 2, 2, 3, 4, 4, 6],
    [0, 1, 2, 1, 2, 3, 4, 5, 6],
  ]
  assert delta == 7 - 9
  assert position_ids.dtype == np.int32


def test_mrope_of_text_alone():
  position_ids, delta = mrope_position_ids(np.arange(4), [], 9, 2)
  assert position_ids.tolist() == [[0, 1, 2, 3]] * 3
  assert delta == 0


def test_mrope_errors():
  with pytest.raises(ValueError, match="1 image tokens in the text, 2"):
    mrope_position_ids(np.array([1, 9, 1]), [(1, 2, 4)], 9, 2)
  with pytest.raises(ValueError, match="do not fill grid"):
    mrope_position_ids(np.array([9, 1, 9]), [(1, 2, 4)], 9, 2)
  with pytest.raises(ValueError, match="multiples of 2"):
    mrope_position_ids(np.array([9, 1]), [(1, 3, 2)], 9, 2)


def test_visual_index_runs_over_images():
  assert visual_index(np.array([9, 9, 1, 9]), 9).tolist() == [0, 1, -1, 2]
