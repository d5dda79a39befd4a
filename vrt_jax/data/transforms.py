"""From one VRT-80k record to padded arrays: pure numpy functions, one after the other.

    bytes -> TrainRecord -> Example (true sizes) -> Batch (a bucket's sizes)

A record that cannot be used raises ValueError("reason: detail"); the pipeline counts the reasons.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from vrt_jax.config import DataConfig, ImageConfig, ModelConfig, NearestMode
from vrt_jax.data.chat import ChatTokenizer, encode_prompt, encode_training
from vrt_jax.data.image import Grid, decode_image, grounding_image, mllm_patches, num_visual_tokens
from vrt_jax.data.positions import (
  VisionLayout,
  mrope_position_ids,
  vision_layout,
  visual_index,
)
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.trace import training_example
from vrt_jax.ops.masks import decode_rle, decode_rle_nearest, rle_size
from vrt_jax.types import IGNORE_INDEX, Batch, Targets, TextInputs, VisionInputs, on_host

NUM_THINK_PROMPTS = 2


@dataclass(frozen=True)
class Prompt:
  """Text and image of one sample at their true sizes."""

  input_ids: Int32[np.ndarray, "T"]
  patches: UInt8[np.ndarray, "P C"]
  grids: tuple[tuple[int, int, int], ...]
  """(t, rows, columns) of patches of each image."""
  grounding_image: UInt8[np.ndarray, "Y X 3"]


@dataclass(frozen=True)
class Example(Prompt):
  """A training sample: the prompt and its answer, labels and masks."""

  labels: Int32[np.ndarray, "T"]
  seg_positions: Int32[np.ndarray, "M"]
  masks: UInt8[np.ndarray, "M Y X"]


def segmentation_of(objects: dict, tag: str) -> dict | list:
  """The `segmentation` of an object's annotation; ValueError where there is none."""
  info = objects[tag]
  if not isinstance(info, dict) or "segmentation" not in info:
    raise ValueError(f"bad mask: {tag} has no segmentation")
  return info["segmentation"]


def object_mask(
  segmentation: dict | list, image_size: tuple[int, int], tag: str
) -> UInt8[np.ndarray, "Y X"]:
  """The mask of an object: one COCO RLE, or the union of a list of them.

  Raises:
    ValueError: the RLE is malformed or has another size than the picture.
  """
  masks = [decode_rle(rle) for rle in checked_rles(segmentation, image_size, tag)]
  return np.logical_or.reduce(masks).astype(np.uint8)


def small_object_mask(
  segmentation: dict | list,
  image_size: tuple[int, int],
  tag: str,
  size: tuple[int, int],
  mode: NearestMode,
) -> UInt8[np.ndarray, "Y X"]:
  """`object_mask` resized to `size` without interpolation; the same errors."""
  rles = checked_rles(segmentation, image_size, tag)
  masks = [decode_rle_nearest(rle, size, mode) for rle in rles]
  return np.logical_or.reduce(masks).astype(np.uint8)


def checked_rles(segmentation: dict | list, image_size: tuple[int, int], tag: str) -> list[dict]:
  """The RLEs of an object, at least one and all of the picture's (height, width)."""
  rles = segmentation if isinstance(segmentation, list) else [segmentation]
  if not rles:
    raise ValueError(f"bad mask: {tag} has an empty segmentation")
  for rle in rles:
    if rle_size(rle) != image_size:
      raise ValueError(f"mask size: {tag} is {rle_size(rle)}, its image {image_size}")
  return rles


def choose_mentions(num_mentions: int, num_objects: int, rng: np.random.Generator) -> list[int]:
  """Which [SEG] of a sample train the masks.

  Exactly num_objects: all in cyclic repetition when there are fewer, a random choice in text order
  when there are more. Example: 3 mentions for 5 -> [0, 1, 2, 0, 1].
  """
  if num_mentions <= num_objects:
    return [i % num_mentions for i in range(num_objects)]
  return sorted(rng.choice(num_mentions, num_objects, replace=False).tolist())


def make_prompt(
  image_bytes: bytes,
  user_text: str,
  tokenizer: ChatTokenizer,
  image: ImageConfig,
  *,
  inference: bool,
  blind: bool = False,
) -> tuple[Prompt, tuple[int, int]]:
  """Prompt arrays and the picture's (height, width); the image is decoded once."""
  views = picture_views(image_bytes, image, inference=inference, blind=blind)
  num_visual = num_visual_tokens(views.grid, image.merge_size)
  prompt = Prompt(
    input_ids=np.asarray(encode_prompt(tokenizer, user_text, [num_visual]), np.int32),
    patches=views.patches,
    grids=(views.grid,),
    grounding_image=views.grounding_image,
  )
  return prompt, views.size


class PictureViews(NamedTuple):
  """A picture as the two models see it."""

  patches: UInt8[np.ndarray, "P C"]
  grid: Grid
  grounding_image: UInt8[np.ndarray, "Y X 3"]
  size: tuple[int, int]
  """(height, width) of the file."""


def picture_views(
  image_bytes: bytes, image: ImageConfig, *, inference: bool, blind: bool = False
) -> PictureViews:
  """Both views of a picture that is decoded once; `blind` takes noise of its size instead."""
  picture = decode_image(image_bytes)
  if blind:
    picture = noise_like(picture, image_bytes)
  patches, grid = mllm_patches(picture, image, inference=inference)
  small = grounding_image(picture, image.grounding_size_px)
  return PictureViews(patches, grid, small, (picture.height, picture.width))


def noise_like(picture: Image.Image, image_bytes: bytes) -> Image.Image:
  """A picture of the same size that shows uniform noise, the same for the same bytes."""
  rng = np.random.default_rng(zlib.crc32(image_bytes))
  return Image.fromarray(rng.integers(0, 256, (picture.height, picture.width, 3), np.uint8))


def make_example(
  record: TrainRecord,
  tokenizer: ChatTokenizer,
  data: DataConfig,
  image: ImageConfig,
  rng: np.random.Generator,
) -> Example:
  """The training sample of a record.

  Raises:
    ValueError: "reason: detail" where the record cannot be used.
  """
  think_prompt = int(rng.integers(NUM_THINK_PROMPTS))
  user_text, target_text, tags = training_example(record.annotation, data.thinking, think_prompt)
  views = picture_views(record.image, image, inference=False, blind=data.blind)
  max_tokens, max_patches = data.buckets[-1]
  if len(views.patches) > max_patches:
    raise ValueError(f"too many patches: {len(views.patches)} of at most {max_patches}")
  num_visual = num_visual_tokens(views.grid, image.merge_size)
  ids, labels = encode_training(tokenizer, user_text, target_text, [num_visual], max_tokens)

  input_ids = np.asarray(ids, np.int32)
  positions = np.flatnonzero(input_ids == tokenizer.seg_id)
  if len(positions) != len(tags):
    raise ValueError(f"mask mentions: {len(positions)} [SEG] tokens for {len(tags)} object tags")
  chosen = choose_mentions(len(tags), data.num_objects, rng)
  objects = record.annotation["original_annotation"]["objects_anns"]
  mask_size = (image.grounding_size_px // 4,) * 2
  masks = {
    tag: small_object_mask(
      segmentation_of(objects, tag), views.size, tag, mask_size, data.mask_resize
    )
    for tag in dict.fromkeys(tags[i] for i in chosen)
  }
  return Example(
    input_ids=input_ids,
    patches=views.patches,
    grids=(views.grid,),
    grounding_image=views.grounding_image,
    labels=np.asarray(labels, np.int32),
    seg_positions=positions[chosen].astype(np.int32),
    masks=np.stack([masks[tags[i]] for i in chosen]),
  )


def choose_bucket(
  samples: Sequence[Prompt], buckets: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
  """The first (tokens, patches) bucket that holds every sample; ValueError where none does."""
  tokens = max(len(s.input_ids) for s in samples)
  patches = max(len(s.patches) for s in samples)
  for bucket in buckets:
    if tokens <= bucket[0] and patches <= bucket[1]:
      return bucket
  raise ValueError(
    f"too long: {tokens} tokens and {patches} patches fit none of the buckets {buckets}"
  )


def pad_inputs(
  samples: Sequence[Prompt],
  bucket: tuple[int, int],
  tokenizer: ChatTokenizer,
  image: ImageConfig,
  position_side: int,
) -> tuple[TextInputs, VisionInputs, Int32[np.ndarray, "B"]]:
  """Padded model inputs and the M-RoPE delta of each sample.

  Text is right-padded with id 0. `position_side` is the side of the learned position grid.
  """
  num_tokens, num_patches = bucket
  batch, values = len(samples), samples[0].patches.shape[1]
  input_ids = np.zeros((batch, num_tokens), np.int32)
  token_mask = np.zeros((batch, num_tokens), bool)
  position_ids = np.zeros((3, batch, num_tokens), np.int32)
  indices = np.full((batch, num_tokens), -1, np.int32)
  pixel_values = np.zeros((batch, num_patches, values), np.uint8)
  layouts, deltas = [], []
  for row, s in enumerate(samples):
    n, grids = len(s.input_ids), list(s.grids)
    positions, delta = mrope_position_ids(
      s.input_ids, grids, tokenizer.image_pad_id, image.merge_size
    )
    input_ids[row, :n] = s.input_ids
    token_mask[row, :n] = True
    position_ids[:, row, :n] = positions
    indices[row, :n] = visual_index(s.input_ids, tokenizer.image_pad_id)
    pixel_values[row, : len(s.patches)] = s.patches
    layouts.append(vision_layout(grids, num_patches, image.merge_size, position_side))
    deltas.append(delta)
  text = TextInputs(
    input_ids=on_host(input_ids),
    token_mask=on_host(token_mask),
    position_ids=on_host(position_ids),
    visual_index=on_host(indices),
  )
  layout = VisionLayout(*map(np.stack, zip(*layouts, strict=True)))._asdict()
  vision = VisionInputs(
    pixel_values=on_host(pixel_values), **{name: on_host(x) for name, x in layout.items()}
  )
  return text, vision, np.asarray(deltas, np.int32)


def collate(
  examples: list[Example],
  tokenizer: ChatTokenizer,
  model: ModelConfig,
  image: ImageConfig,
  buckets: tuple[tuple[int, int], ...],
) -> Batch:
  """Examples -> one Batch of the smallest bucket that holds them."""
  bucket = choose_bucket(examples, buckets)
  side = int(model.vision.num_position_embeddings**0.5)
  text, vision, _ = pad_inputs(examples, bucket, tokenizer, image, side)
  labels = [
    np.pad(e.labels, (0, bucket[0] - len(e.labels)), constant_values=IGNORE_INDEX) for e in examples
  ]
  targets = Targets(
    labels=on_host(np.stack(labels).astype(np.int32)),
    seg_positions=on_host(np.stack([e.seg_positions for e in examples])),
    seg_valid=on_host(np.ones((len(examples), len(examples[0].seg_positions)), bool)),
    masks=on_host(np.stack([e.masks for e in examples])),
  )
  grounding = on_host(np.stack([e.grounding_image for e in examples]))
  return Batch(vision=vision, text=text, grounding_image=grounding, targets=targets)
