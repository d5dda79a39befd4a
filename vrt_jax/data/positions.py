"""Positions of patches and tokens, computed on the host so that the device sees fixed shapes.

A grid is (t, h, w) in patches, as the image processor's image_grid_thw; an image has t = 1.
Patches come in merge-block order: [t, h / merge, w / merge, merge, merge].
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

Grid = tuple[int, int, int]


class VisionLayout(NamedTuple):
  """The fields of `types.VisionInputs` that depend on grids alone, for one sample."""

  patch_segments: Int32[np.ndarray, "P"]
  """1, 2, .. (one a frame), 0 for padding."""
  patch_positions: Int32[np.ndarray, "P 2"]
  pos_embed_index: Int32[np.ndarray, "P 4"]
  pos_embed_weight: Float32[np.ndarray, "P 4"]


def _taps(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Two table positions and weights for each of `size` points spread over 0 .. side - 1.

  >>> _taps(3, 4)[0].tolist()
  [[0, 1], [1, 2], [3, 3]]
  """
  source = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
  low = np.floor(source)
  high_weight = source - low
  index = np.stack([low, np.minimum(low + 1, side - 1)], axis=-1).astype(np.int32)
  return index, np.stack([1 - high_weight, high_weight], axis=-1)


def _merge_order(rows: np.ndarray, merge: int) -> np.ndarray:
  """[h, w, ..] -> [h * w, ..] with the patches of a merge x merge block next to each other."""
  h, w, *rest = rows.shape
  blocks = rows.reshape(h // merge, merge, w // merge, merge, *rest)
  return blocks.swapaxes(1, 2).reshape(h * w, *rest)


def _check_grid(grid: Grid, merge: int) -> None:
  t, h, w = grid
  if min(t, h, w) < 1 or h % merge or w % merge:
    raise ValueError(f"grid {tuple(grid)}: height and width must be positive multiples of {merge}")


def _frame_layout(h: int, w: int, merge: int, side: int) -> tuple[np.ndarray, ...]:
  """Positions (P, 2), table indices (P, 4) and weights (P, 4) of an h x w frame."""
  positions = np.stack([*np.mgrid[:h, :w]], axis=-1).astype(np.int32)
  row_index, row_weight = _taps(h, side)
  column_index, column_weight = _taps(w, side)
  index = row_index[:, None, :, None] * side + column_index[None, :, None, :]
  weight = row_weight[:, None, :, None] * column_weight[None, :, None, :]
  return tuple(
    _merge_order(a, merge) for a in (positions, index.reshape(h, w, 4), weight.reshape(h, w, 4))
  )


def vision_layout(grids: list[Grid], num_patches: int, merge: int, side: int) -> VisionLayout:
  """Segments, rope positions and learned-position taps of a sample, padded to `num_patches`.

  The side x side learned positions are interpolated bilinearly with aligned corners (HF
  Qwen3VLVisionModel). A grid with t > 1 repeats its frame, each one a segment of its own.

  >>> vision_layout([(1, 2, 2)], 5, merge=2, side=2).patch_positions.tolist()
  [[0, 0], [0, 1], [1, 0], [1, 1], [0, 0]]

  Raises ValueError where a grid does not divide by `merge` or the patches exceed `num_patches`.
  """
  for grid in grids:
    _check_grid(grid, merge)
  total = sum(t * h * w for t, h, w in grids)
  if total > num_patches:
    raise ValueError(f"the images of a sample have {total} patches, more than {num_patches}")
  layout = VisionLayout(
    np.zeros(num_patches, np.int32),
    np.zeros((num_patches, 2), np.int32),
    np.zeros((num_patches, 4), np.int32),
    np.zeros((num_patches, 4), np.float32),
  )
  start, segment = 0, 0
  for t, h, w in grids:
    frame = _frame_layout(h, w, merge, side)
    for _ in range(t):
      segment += 1
      span = slice(start, start + h * w)
      layout.patch_segments[span] = segment
      for target, values in zip(layout[1:], frame, strict=True):
        target[span] = values
      start += h * w
  return layout


def mrope_position_ids(
  input_ids: Int[np.ndarray, "T"], grids: list[Grid], image_token_id: int, merge: int
) -> tuple[Int32[np.ndarray, "3 T"], int]:
  """M-RoPE positions (time, row, column) of unpadded ids and the delta for decoding.

  Text counts up on all three axes. An image starts where the text before it ended and spans its
  merged grid; the text after it goes on from the largest position + 1. Token number n (from 0)
  generated after the ids has position T + n + delta. As HF Qwen3VLModel.get_rope_index.

  >>> mrope_position_ids(np.array([7, 9, 9, 7]), [(1, 2, 4)], image_token_id=9, merge=2)[0]
  array([[0, 1, 1, 3],
         [0, 1, 1, 3],
         [0, 1, 2, 3]], dtype=int32)

  Raises ValueError where image tokens and grids do not match.
  """
  input_ids = np.asarray(input_ids)
  is_image = input_ids == image_token_id
  expected = sum(t * (h // merge) * (w // merge) for t, h, w in grids)
  if is_image.sum() != expected:
    raise ValueError(f"{is_image.sum()} image tokens in the text, {expected} in grids {grids}")
  position_ids = np.zeros((3, len(input_ids)), np.int32)
  done, next_position = 0, 0
  for grid in grids:
    _check_grid(grid, merge)
    merged = (grid[0], grid[1] // merge, grid[2] // merge)
    begin = done + int(np.argmax(is_image[done:]))
    end = begin + int(np.prod(merged))
    if not is_image[begin:end].all():
      raise ValueError(f"the image tokens from position {begin} do not fill grid {tuple(grid)}")
    position_ids[:, done:begin] = np.arange(begin - done) + next_position
    next_position += begin - done
    position_ids[:, begin:end] = np.indices(merged).reshape(3, -1) + next_position
    next_position += max(merged)
    done = end
  position_ids[:, done:] = np.arange(len(input_ids) - done) + next_position
  next_position += len(input_ids) - done
  return position_ids, next_position - len(input_ids)


def visual_index(input_ids: Int[np.ndarray, "T"], image_token_id: int) -> Int32[np.ndarray, "T"]:
  """Running index of the visual token at each position, -1 for text.

  >>> visual_index(np.array([7, 9, 9, 7, 9]), image_token_id=9)
  array([-1,  0,  1, -1,  2], dtype=int32)
  """
  is_image = np.asarray(input_ids) == image_token_id
  return np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
