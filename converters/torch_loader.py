"""The reference's data loading in PyTorch, for speed comparisons: records to tensors.

The steps of Sa2VABaseDataset and sa2va_collect_fn (projects/sa2va/datasets) on records of VRT-80k:
one decoded picture for both models, transformers' image processor, every mention's mask, the
conversation in three parts. The image processor is the one that works with Pillow.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vrt_jax.config import ImageConfig
from vrt_jax.data.chat import VRT_TOKENS, prompt_text
from vrt_jax.data.sources import train_source
from vrt_jax.data.trace import training_example
from vrt_jax.types import IGNORE_INDEX


@dataclass(frozen=True)
class LoaderConfig:
  """What the reference's recipe says about data."""

  data: str
  tokenizer: str
  """Folder with tokenizer.json."""
  image: ImageConfig
  batch_size: int
  num_workers: int
  max_tokens: int = 8192


class VrtDataset(Dataset):
  """Records as the reference's training sees them, in the order of `numbers`."""

  def __init__(self, config: LoaderConfig, numbers: Sequence[int]):
    self.config, self.numbers = config, numbers
    self.source = train_source(config.data)
    self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    self.tokenizer.add_tokens(list(VRT_TOKENS), special_tokens=True)
    image = config.image
    self.processor = Qwen2VLImageProcessorPil(
      patch_size=image.patch_size,
      merge_size=image.merge_size,
      temporal_patch_size=image.temporal_patch_size,
      image_mean=[0.5] * 3,
      image_std=[0.5] * 3,
      min_pixels=image.min_pixels,
      max_pixels=image.max_pixels,
    )

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
    """input_ids [T], labels [T], pixel_values [P, C] float32, image_grid_thw [1, 3], g_pixel_values
    [3, Y, X] uint8, masks [M, Y, X] uint8."""
    record = self.source[self.numbers[index]]
    picture = Image.open(io.BytesIO(record.image)).convert("RGB")
    side = self.config.image.grounding_size_px
    grounding = torch.from_numpy(np.array(picture.resize((side, side)))).permute(2, 0, 1)
    views = self.processor(images=[picture])
    grid = np.asarray(views["image_grid_thw"])
    num_visual = int(grid[0].prod()) // self.config.image.merge_size**2
    user_text, target, tags = training_example(record.annotation, True, index % 2)
    objects = record.annotation["original_annotation"]["objects_anns"]
    return {
      **self.conversation(user_text, target, num_visual),
      "pixel_values": torch.from_numpy(np.asarray(views["pixel_values"])),
      "image_grid_thw": torch.from_numpy(grid),
      "g_pixel_values": grounding.contiguous(),
      "masks": small_masks([objects[tag]["segmentation"] for tag in tags], picture.size, side // 4),
    }

  def conversation(self, user_text: str, target: str, num_visual: int) -> dict[str, torch.Tensor]:
    """The ids of prompt, target with its end, and line break; labels of the target alone."""
    prompt = self.tokenizer.encode(prompt_text(user_text, [num_visual]), add_special_tokens=False)
    answer = self.tokenizer.encode(target.strip() + "<|im_end|>", add_special_tokens=False)
    tail = self.tokenizer.encode("\n", add_special_tokens=False)
    labels = [IGNORE_INDEX] * len(prompt) + answer + [IGNORE_INDEX] * len(tail)
    limit = self.config.max_tokens
    return {
      "input_ids": torch.tensor((prompt + answer + tail)[:limit]),
      "labels": torch.tensor(labels[:limit]),
    }


def small_masks(segmentations: list, picture_size: tuple[int, int], side: int) -> torch.Tensor:
  """The masks of all mentions [M, side, side], decoded at picture size (width, height)."""
  width, height = picture_size
  masks = []
  for segmentation in segmentations:
    mask = np.zeros((height, width), np.uint8)
    for rle in segmentation if isinstance(segmentation, list) else [segmentation]:
      mask |= coco.decode(rle)
    masks.append(torch.from_numpy(mask))
  return F.interpolate(torch.stack(masks)[None], size=(side, side), mode="nearest")[0]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict:
  """Padded ids, pictures of all samples one after the other, masks in a list."""
  ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True)
  labels = [s["labels"] for s in samples]
  return {
    "input_ids": ids,
    "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    "attention_mask": torch.stack(
      [torch.arange(ids.shape[1]) < len(s["input_ids"]) for s in samples]
    ),
    "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
    "image_grid_thw": torch.cat([s["image_grid_thw"] for s in samples]),
    "g_pixel_values": default_collate([s["g_pixel_values"] for s in samples]),
    "masks": [s["masks"] for s in samples],
  }


def make_loader(config: LoaderConfig, numbers: Sequence[int]) -> DataLoader:
  """Batches of these records; worker processes start afresh, as beside JAX they must."""
  return DataLoader(
    VrtDataset(config, numbers),
    batch_size=config.batch_size,
    num_workers=config.num_workers,
    collate_fn=collate,
    multiprocessing_context="spawn" if config.num_workers else None,
  )


def use_one_thread() -> None:
  """Keeps PyTorch to one thread in this process, as it is in a worker."""
  torch.set_num_threads(1)
