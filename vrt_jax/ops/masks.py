"""Binary masks: COCO run-length encoding, sizes, unions and IoU matrices (host side, numpy).

An RLE is `{"size": [height, width], "counts": ...}`: run lengths in column-major order, the first
run being background. `counts` is COCO's compressed string (str or bytes) or a plain list of runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Shaped
from pycocotools import mask as coco

from vrt_jax.config import NearestMode
from vrt_jax.ops.nearest import nearest_source


class Rle(TypedDict):
  """A COCO run-length encoding in its normal form: counts is a compressed str."""

  size: list[int]
  counts: str


Mask = Shaped[np.ndarray, "Y X"] | Mapping[str, Any]
"""A dense mask (non-zero is inside) or an RLE in any of its forms."""

MAX_CHARS_PER_RUN = 8  # 5 bits a character: runs of up to 39 bits


def encode_rle(mask: np.ndarray) -> Rle:
  """The RLE of a dense mask [Y, X]; raises ValueError where it is not two-dimensional."""
  mask = np.asarray(mask)
  if mask.ndim != 2:
    raise ValueError(f"mask: expected two dimensions (height, width), got shape {mask.shape}")
  encoded = coco.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
  return {"size": [int(s) for s in mask.shape], "counts": encoded["counts"].decode()}


def decode_rle(rle: Mapping[str, Any]) -> Bool[np.ndarray, "Y X"]:
  """The dense mask of an RLE; raises ValueError where the RLE is malformed."""
  height, width = rle_size(rle)
  runs = _checked_runs(rle, height * width)
  values = (np.arange(len(runs)) % 2).astype(bool)
  return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def decode_rle_nearest(
  rle: Mapping[str, Any], size: tuple[int, int], mode: NearestMode = "nearest"
) -> Bool[np.ndarray, "Yo Xo"]:
  """`resize_nearest_numpy(decode_rle(rle), size, mode)` without the dense mask.

  The pixels that are read, in the order of the runs, divide into runs again: each run holds those
  between its ends. Raises ValueError where the RLE is malformed.
  """
  height, width = rle_size(rle)
  runs = _checked_runs(rle, height * width)
  rows = nearest_source(height, size[0], mode)
  columns, copies = np.unique(nearest_source(width, size[1], mode), return_inverse=True)
  read = (columns[:, None] * height + rows).ravel()
  ends = np.searchsorted(read, np.cumsum(runs))
  values = (np.arange(len(runs)) % 2).astype(bool)
  sampled = np.repeat(values, np.diff(ends, prepend=0))
  return np.ascontiguousarray(sampled.reshape(len(columns), len(rows))[copies].T)


def as_rle(mask: Mask) -> Rle:
  """Any mask in the normal form of an RLE; raises ValueError where it is malformed."""
  if not isinstance(mask, Mapping):
    return encode_rle(np.asarray(mask))
  height, width = rle_size(mask)
  runs = _checked_runs(mask, height * width)
  counts = mask["counts"]
  if isinstance(counts, str | bytes):
    text = counts if isinstance(counts, str) else counts.decode("ascii")
    return {"size": [height, width], "counts": text}
  packed = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
  return {"size": [height, width], "counts": packed["counts"].decode()}


def rle_size(rle: Mapping[str, Any]) -> tuple[int, int]:
  """(height, width) of an RLE; raises ValueError where `size` or `counts` is missing or wrong."""
  if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
    raise ValueError("RLE: expected an object with `size` and `counts`")
  size = rle["size"]
  if (
    not isinstance(size, Sequence | np.ndarray)
    or len(size) != 2
    or not all(isinstance(s, int | np.integer) and s > 0 for s in size)
  ):
    raise ValueError(f"RLE: size must be two positive integers [height, width], got {size!r}")
  return int(size[0]), int(size[1])


def mask_size(mask: Mask) -> tuple[int, int]:
  """(height, width) of a dense mask or an RLE."""
  if isinstance(mask, Mapping):
    return rle_size(mask)
  shape = np.shape(mask)
  if len(shape) != 2:
    raise ValueError(f"mask: expected two dimensions (height, width), got shape {shape}")
  return shape


def check_mask_size(mask: Mask, image_size: Sequence[int]) -> None:
  """Raises ValueError unless the mask has the image's (height, width)."""
  (height, width), (rows, columns) = mask_size(mask), image_size
  if (height, width) != (rows, columns):
    raise ValueError(
      f"mask size: the mask is {height}x{width} (height x width), the image {rows}x{columns}"
    )


def union_rle(rles: Sequence[Mask]) -> Rle:
  """The union of at least one mask; raises ValueError for none or for differing sizes."""
  if not rles:
    raise ValueError("mask union: no mask given")
  normal = [as_rle(r) for r in rles]
  for rle in normal[1:]:
    check_mask_size(rle, normal[0]["size"])
  merged = coco.merge(normal, intersect=False)
  return {"size": normal[0]["size"], "counts": merged["counts"].decode()}


def area_shares(rles: Sequence[Rle]) -> list[float]:
  """The share of its picture's pixels of each mask, in the normal form of `as_rle`."""
  areas = coco.area(rles).tolist() if rles else []
  return [area / (r["size"][0] * r["size"][1]) for area, r in zip(areas, rles, strict=True)]


def iou_matrix(pred: Sequence[Mask], gt: Sequence[Mask]) -> Float[np.ndarray, "M N"]:
  """IoU of every predicted with every ground-truth mask, float32; an empty union gives 0.

  Dense masks and RLEs may be mixed. Raises ValueError ("mask size: ...") where sizes differ.
  The numbers equal the reference's `calculate_miou` (vrt_eval_single.py) bit for bit.
  """
  pred_rles, gt_rles = [as_rle(m) for m in pred], [as_rle(m) for m in gt]
  for rle in [*pred_rles, *gt_rles[1:]] if gt_rles else []:
    check_mask_size(rle, gt_rles[0]["size"])
  return rle_iou_matrix(pred_rles, gt_rles)


def rle_iou_matrix(pred: Sequence[Rle], gt: Sequence[Rle]) -> Float[np.ndarray, "M N"]:
  """`iou_matrix` of masks of one size that are in the normal form of `as_rle` already."""
  if len(pred) == 0 or len(gt) == 0:
    return np.zeros((len(pred), len(gt)), np.float32)
  ious = coco.iou(list(pred), list(gt), [0] * len(gt))
  return np.asarray(ious, np.float32).reshape(len(pred), len(gt))


def _checked_runs(rle: Mapping[str, Any], pixels: int) -> np.ndarray:
  counts = rle["counts"]
  if isinstance(counts, str | bytes):
    runs = _parse_counts(counts)
  elif isinstance(counts, Sequence | np.ndarray):
    runs = np.asarray(counts)
    if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer):
      raise ValueError("RLE: counts must be a string or a list of integers")
  else:
    raise ValueError(f"RLE: counts must be a string or a list, got {type(counts).__name__}")
  if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
    raise ValueError(
      f"RLE: the runs do not fill a mask of {rle['size'][0]}x{rle['size'][1]} pixels"
    )
  return runs


def _parse_counts(counts: str | bytes) -> np.ndarray:
  """Run lengths of COCO's string: 5-bit groups, low first, signed, differences from run 3 on."""
  raw = counts.encode("utf-8") if isinstance(counts, str) else counts
  groups = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
  if groups.size == 0 or (groups < 0).any() or (groups > 63).any() or groups[-1] & 0x20:
    raise ValueError("RLE: counts is not a COCO run-length string")
  ends = np.flatnonzero((groups & 0x20) == 0)
  starts = np.concatenate([[0], ends[:-1] + 1])
  lengths = ends - starts + 1
  if lengths.max() > MAX_CHARS_PER_RUN:
    raise ValueError("RLE: counts holds a run that is too long")
  shifts = 5 * (np.arange(groups.size) - np.repeat(starts, lengths))
  values = np.add.reduceat((groups & 0x1F) << shifts, starts)
  negative = (groups[ends] & 0x10) != 0
  values = values - np.where(negative, np.int64(1) << (5 * lengths), 0)
  values[1::2] = np.cumsum(values[1::2])
  values[2::2] = np.cumsum(values[2::2])
  return values
