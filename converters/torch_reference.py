"""The reference's computation in PyTorch, put together from transformers' Qwen3-VL and SAM 2.

It computes what Sa2VAChatModelQwen.predict_forward computes, stage by stage, so that every stage
can be compared. The segmentation half is transformers' Sam2Model instead of the copy of sam2 that
the reference carries; both have the same numbers.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Sam2Config, Sam2Model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from converters.conversion import convert_tensors, expected_sa2va
from converters.export import rename
from converters.sa2va_rules import QWEN_PREFIX, sa2va_table
from converters.sam2_config import sam2_hf_config
from converters.sam2_rules import HF
from converters.streams import Checksums
from converters.tensor_files import open_folder, read_tensor
from vrt_jax.config import ImageConfig, ModelConfig
from vrt_jax.data.image import smart_resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TorchSa2VA(nn.Module):
  """Qwen3-VL, `text_hidden_fcs` and SAM 2."""

  def __init__(
    self, qwen: Qwen3VLForConditionalGeneration, text_hidden_fcs: nn.Sequential, sam2: Sam2Model
  ):
    super().__init__()
    self.qwen, self.text_hidden_fcs, self.sam2 = qwen, text_hidden_fcs, sam2
    self.last_layer_outputs: list[Tensor] = []
    qwen.model.language_model.layers[-1].register_forward_hook(
      lambda module, args, output: self.last_layer_outputs.append(output)
    )

  def states(self) -> Tensor:
    """States before the final norm of all tokens since the last call, [B, T, D]."""
    states = torch.cat(self.last_layer_outputs, dim=1)
    self.last_layer_outputs.clear()
    return states

  def image_maps(self, image: np.ndarray) -> list[Tensor]:
    """Grounding image [Y, X, 3] uint8 -> pyramid maps of strides 4, 8, 16, the last with memory."""
    pixels = (torch.tensor(image) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    pixels = pixels.to(self.sam2.dtype)
    with torch.no_grad():
      levels = self.sam2.vision_encoder(pixels.permute(2, 0, 1)[None]).fpn_hidden_states
      stride16 = levels[2] + self.sam2.no_memory_embedding.reshape(1, -1, 1, 1)
    return [levels[0], levels[1], stride16]

  def decode(self, maps: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """[SEG] states [M, D] -> (mask logits [M, 3, Y4, X4], IoUs [M, 3]) of the multimask outputs."""
    count = len(states)
    with torch.no_grad():
      empty, dense = self.sam2.get_prompt_embeddings(
        input_points=torch.zeros(1, count, 1, 2),
        input_labels=-torch.ones(1, count, 1, dtype=torch.int32),  # type: ignore[arg-type]
      )
    language = self.text_hidden_fcs(states)[None, :, None]
    sparse = torch.cat([empty.to(language.dtype), language], dim=2)
    decoder = self.sam2.mask_decoder
    masks, iou, _, _ = decoder(
      image_embeddings=maps[2],
      image_positional_embeddings=self.sam2.get_image_wide_positional_embeddings().to(sparse.dtype),
      sparse_prompt_embeddings=sparse,
      dense_prompt_embeddings=dense.to(sparse.dtype),
      multimask_output=True,
      high_resolution_features=[decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1])],
    )
    return masks[0], iou[0]

  def best_masks(self, maps: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with the best predicted IoU of three: (logits [M, Y4, X4], IoUs [M])."""
    masks, iou = self.decode(maps, states)
    best = iou.argmax(dim=-1)
    rows = torch.arange(len(states))
    return masks[rows, best], iou[rows, best]


def load_reference(
  folder: Path, config: dict[str, Any], model: ModelConfig, dtype: torch.dtype
) -> TorchSa2VA:
  """The PyTorch model of an export; `config` is its config.json, `model` our sizes of it.

  Raises:
    ValueError: tensors that do not fit the sizes.
  """
  source = open_folder(folder)
  shapes = expected_sa2va(model)[0]
  table = sa2va_table(model.text.tie_embeddings)
  params, _ = convert_tensors(table, source, shapes, Checksums())
  with torch.device("meta"):
    qwen = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    sam2 = Sam2Model(Sam2Config(**sam2_hf_config(model.sam2, "float32")))
  state = {
    key.removeprefix(QWEN_PREFIX): _tensor(read_tensor(source, key), dtype)
    for key in source.shapes
    if key.startswith(QWEN_PREFIX)
  }
  if model.text.tie_embeddings:
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
  qwen.load_state_dict(state, assign=True)
  names = rename(HF, {k: v for k, v in params.items() if k.startswith("sam2.")})
  state = {key: _tensor(a.read(0, a.shape[0]), dtype) for key, a in names.items()}
  state |= {tie.copy: state[tie.original] for tie in HF.tied}
  sam2.load_state_dict(state, assign=True)
  width, out = model.text.hidden_size, model.sam2.d_model
  fcs = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)).to(dtype)
  prefix = "text_hidden_fcs."
  fcs.load_state_dict(
    {
      key.removeprefix(prefix): _tensor(read_tensor(source, key), dtype)
      for key in source.shapes
      if key.startswith(prefix)
    }
  )
  text, visual = qwen.model.language_model, qwen.model.visual  # buffers that no checkpoint holds
  text.rotary_emb = type(text.rotary_emb)(qwen.config.text_config)
  visual.rotary_pos_emb = type(visual.rotary_pos_emb)(qwen.config.vision_config)
  return TorchSa2VA(qwen, fcs, sam2).eval()


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
  return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32))).to(dtype)


@dataclass(frozen=True)
class Processed:
  """A picture as the reference's processor gives it at inference."""

  pixel_values: np.ndarray
  grid: tuple[int, int, int]
  size: tuple[int, int]
  """(height, width) of the picture itself."""


def process_image(data: bytes, image: ImageConfig) -> Processed:
  """qwen_vl_utils' resize to multiples of its factor, then transformers' image processor."""
  picture = Image.open(io.BytesIO(data)).convert("RGB")
  size = (picture.height, picture.width)
  if image.inference_factor_px:
    rows, columns = smart_resize(
      *size,
      image.inference_factor_px,
      image.inference_min_pixels,
      image.inference_max_pixels,
      at_least_factor=True,
    )
    picture = picture.resize((columns, rows), resample=Image.Resampling.BICUBIC)
  processor = Qwen2VLImageProcessorPil(
    patch_size=image.patch_size,
    temporal_patch_size=image.temporal_patch_size,
    merge_size=image.merge_size,
    min_pixels=image.min_pixels,
    max_pixels=image.max_pixels,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
  )
  out = processor(images=[picture], return_tensors="np")
  t, h, w = (int(n) for n in out["image_grid_thw"][0])
  return Processed(np.asarray(out["pixel_values"]), (t, h, w), size)
