"""The stages of a prediction in PyTorch, each as an array to compare with."""

from pathlib import Path

import numpy as np
import torch

from converters.config_reader import read_config
from converters.torch_reference import TorchSa2VA, load_reference, process_image
from vrt_jax.data.chat import ChatTokenizer, encode_prompt
from vrt_jax.data.image import decode_image, grounding_image
from vrt_jax.data.trace import evaluation_user_text
from vrt_jax.model_directory import Loaded

FALLBACK_TEXT = " <answer><obj1> [SEG].</answer>"
"""Appended to a text without [SEG], so that there is a mask to compare."""


def run(
  folder: Path, loaded: Loaded, data: bytes, question: str, dtype_name: str, max_new_tokens: int
) -> tuple[dict[str, np.ndarray], list[int]]:
  """Every stage by its name, float32, and the generated ids.

  Args:
    folder: a Sa2VA export.
    loaded: its sizes, tokenizer and preprocessing; the parameters may be missing.
    data: the picture's file.
    dtype_name: "float32" or "bfloat16", of weights and activations.
  """
  tokenizer, image = loaded.tokenizer, loaded.image
  processed = process_image(data, image)
  user_text = evaluation_user_text(question, True)
  num_visual = int(np.prod(processed.grid)) // image.merge_size**2
  prompt = encode_prompt(tokenizer, user_text, [num_visual])
  dtype = getattr(torch, dtype_name)
  model = load_reference(folder, read_config(folder), loaded.model.config, dtype)
  pixels = torch.from_numpy(processed.pixel_values).to(dtype)
  vision = {"pixel_values": pixels, "image_grid_thw": torch.tensor([processed.grid])}

  def inputs(ids: list[int]) -> dict:
    row = torch.tensor([ids])
    types = (row == tokenizer.image_pad_id).int()
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "mm_token_type_ids": types}

  with torch.no_grad():
    generated = model.qwen.generate(
      **inputs(prompt),
      **vision,
      do_sample=False,
      max_new_tokens=max_new_tokens,
      eos_token_id=tokenizer.im_end_id,
      pad_token_id=tokenizer.endoftext_id,
      suppress_tokens=list(tokenizer.never_sample_ids),
    )[0, len(prompt) :].tolist()
    model.states()
    ids = with_seg(prompt + generated, tokenizer)
    logits = model.qwen(**inputs(ids), **vision).logits[0, len(prompt) - 1 :]
    states = model.states()[0]
    tower = model.qwen.model.visual(pixels, grid_thw=vision["image_grid_thw"])
    seg = states[torch.tensor(ids) == tokenizer.seg_id]
    if loaded.model.config.seg_hidden == "post_norm":
      seg = model.qwen.model.language_model.norm(seg)
    stages = {"image patches": processed.pixel_values, "visual tokens": tower.pooler_output}
    stages |= {f"deepstack {i}": x for i, x in enumerate(tower.deepstack_features)}
    stages |= {"hidden states before the norm": states, "logits": logits}
    stages |= _segmentation(model, data, image.grounding_size_px, processed.size, seg)
  out = {k: v if isinstance(v, np.ndarray) else v.float().numpy() for k, v in stages.items()}
  return out, generated


def _segmentation(
  model: TorchSa2VA, data: bytes, side: int, size: tuple[int, int], seg: torch.Tensor
) -> dict[str, torch.Tensor]:
  """From the [SEG] states [M, D] to mask logits at picture size."""
  maps = model.image_maps(grounding_image(decode_image(data), side))
  masks, iou = model.decode(maps, seg)
  final = masks[torch.arange(len(seg)), iou.argmax(dim=-1)].float()[:, None]
  for target in ((side, side), size):
    final = torch.nn.functional.interpolate(final, size=target, mode="bilinear")
  stages = {"[SEG] prompts": model.text_hidden_fcs(seg)}
  stages |= {f"SAM 2 stride {4 * 2**i}": m.permute(0, 2, 3, 1) for i, m in enumerate(maps)}
  return stages | {"mask logits": masks, "predicted IoU": iou, "final mask logits": final[:, 0]}


def with_seg(ids: list[int], tokenizer: ChatTokenizer) -> list[int]:
  """The ids, with a [SEG] among them."""
  return ids if tokenizer.seg_id in ids else ids + tokenizer.encode(FALLBACK_TEXT)
