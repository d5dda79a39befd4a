"""Shape buckets of batches: (tokens, patches) sizes that training compiles once each.

A host pads its rows to the smallest bucket that holds them, so neighbouring batches differ in
size. Where several hosts share a step they agree on the largest of their buckets and grow their
rows to it:

    index = max over hosts of bucket_of(batch, buckets)
    batch = pad_to_bucket(batch, buckets[index])
"""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jax import Array

from vrt_jax.types import IGNORE_INDEX, Batch, PromptBatch, on_host

Bucket = tuple[int, int]
"""(tokens, patches) of every sample of a batch."""


def check_buckets(buckets: Sequence[Bucket], name: str = "data.buckets") -> None:
  """Raises ValueError unless each bucket holds all that the ones before it hold."""
  if not buckets or any(len(b) != 2 or min(b) < 1 for b in buckets):
    raise ValueError(f"{name} must be pairs (tokens, patches), not {tuple(buckets)}")
  for small, large in itertools.pairwise(buckets):
    if small == large or small[0] > large[0] or small[1] > large[1]:
      raise ValueError(f"{name} must ascend in tokens and in patches, but {large} follows {small}")


Padded = TypeVar("Padded", Batch, PromptBatch)


def bucket_of(batch: Padded, buckets: Sequence[Bucket]) -> int:
  """Index of the bucket whose sizes a batch has; ValueError where it has none's."""
  size = (batch.text.input_ids.shape[1], batch.vision.pixel_values.shape[1])
  for index, bucket in enumerate(buckets):
    if tuple(bucket) == size:
      return index
  raise ValueError(f"a batch of {size} (tokens, patches) has none of the buckets {tuple(buckets)}")


def pad_to_bucket(batch: Padded, bucket: Bucket) -> Padded:
  """The same samples padded to a larger bucket, as `collate` pads: numpy in and out.

      tokens 3 -> 5: input_ids [7, 8, 9] -> [7, 8, 9, 0, 0], labels end in IGNORE_INDEX

  Raises ValueError where the batch is larger than the bucket.
  """
  tokens = bucket[0] - batch.text.input_ids.shape[1]
  patches = bucket[1] - batch.vision.pixel_values.shape[1]
  if min(tokens, patches) < 0:
    raise ValueError(
      f"a batch of {batch.text.input_ids.shape[1]} tokens and {batch.vision.pixel_values.shape[1]} "
      f"patches does not fit the bucket {tuple(bucket)}"
    )
  if tokens == patches == 0:
    return batch
  text, vision = batch.text, batch.vision
  batch = batch.replace(
    text=text.replace(
      input_ids=_grow(text.input_ids, 1, tokens, 0),
      token_mask=_grow(text.token_mask, 1, tokens, False),
      position_ids=_grow(text.position_ids, 2, tokens, 0),
      visual_index=_grow(text.visual_index, 1, tokens, -1),
    ),
    vision=vision.replace(
      pixel_values=_grow(vision.pixel_values, 1, patches, 0),
      patch_segments=_grow(vision.patch_segments, 1, patches, 0),
      patch_positions=_grow(vision.patch_positions, 1, patches, 0),
      pos_embed_index=_grow(vision.pos_embed_index, 1, patches, 0),
      pos_embed_weight=_grow(vision.pos_embed_weight, 1, patches, 0),
    ),
  )
  if isinstance(batch, PromptBatch):
    return batch
  targets = batch.targets
  return batch.replace(
    targets=targets.replace(labels=_grow(targets.labels, 1, tokens, IGNORE_INDEX))
  )


def _grow(array: Array, axis: int, count: int, value: int) -> Array:
  """`count` more entries of `value` at the end of an axis."""
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, count)
  return on_host(np.pad(array, widths, constant_values=value))
