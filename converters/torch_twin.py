"""PyTorch models with the weights of a model of ours, to compare numbers and speed."""

import numpy as np
import torch
from flax import nnx
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Sam2Config, Sam2Model

from converters.export import patch_kernel, rename
from converters.hf_config import hf_config
from converters.qwen3_vl_rules import qwen3_vl_table
from converters.rules import RuleTable
from converters.sam2_config import sam2_hf_config
from converters.sam2_rules import HF
from converters.streams import whole
from converters.torch_reference import TorchSa2VA
from vrt_jax.config import ModelConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.image import normalize_patches
from vrt_jax.data.transforms import Prompt
from vrt_jax.models.sa2va import Sa2VA


def untrained(config: ModelConfig, tokenizer: ChatTokenizer) -> TorchSa2VA:
  """A model of the same sizes with weights as transformers draws them."""
  width, out = config.text.hidden_size, config.sam2.d_model
  fcs = torch.nn.Sequential(
    torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, out)
  )
  sam2 = Sam2Model(Sam2Config(**sam2_hf_config(config.sam2, "float32")))
  return TorchSa2VA(untrained_qwen(config, tokenizer), fcs, sam2).eval()


def untrained_qwen(
  config: ModelConfig, tokenizer: ChatTokenizer
) -> Qwen3VLForConditionalGeneration:
  """The language half of `untrained`."""
  sizes = Qwen3VLConfig(**hf_config(config, tokenizer, "float32", {}))
  return Qwen3VLForConditionalGeneration(sizes).eval()


def torch_twin(model: Sa2VA, tokenizer: ChatTokenizer) -> TorchSa2VA:
  """The whole model in float32, without adapters."""
  theirs = untrained(model.config, tokenizer)
  _load_qwen(theirs.qwen, model)
  state = _tensors(model, "sam2", HF)
  theirs.sam2.load_state_dict(state | {tie.copy: state[tie.original] for tie in HF.tied})
  fcs = model.text_hidden_fcs
  with torch.no_grad():
    for index, ours in ((0, fcs.fc1), (2, fcs.fc2)):
      layer = theirs.text_hidden_fcs[index]
      assert isinstance(layer, torch.nn.Linear) and ours.bias is not None
      layer.weight.copy_(torch.from_numpy(np.array(ours.weight[...])))
      layer.bias.copy_(torch.from_numpy(np.array(ours.bias[...])))
  return theirs


def qwen_twin(model: Sa2VA, tokenizer: ChatTokenizer) -> Qwen3VLForConditionalGeneration:
  """The language half in float32, without adapters."""
  qwen = untrained_qwen(model.config, tokenizer)
  _load_qwen(qwen, model)
  return qwen


def _load_qwen(qwen: Qwen3VLForConditionalGeneration, model: Sa2VA) -> None:
  tied = model.config.text.tie_embeddings
  state = _tensors(model, "qwen", qwen3_vl_table(tied))
  if tied:
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
  qwen.load_state_dict(state)


def prompt_inputs(prompt: Prompt, tokenizer: ChatTokenizer, rows: int = 1) -> dict[str, Tensor]:
  """`rows` times a prompt as transformers' Qwen3-VL takes it, pixels in float32."""
  row = torch.from_numpy(np.asarray(prompt.input_ids, np.int64))[None].repeat(rows, 1)
  pixels = np.tile(np.asarray(normalize_patches(prompt.patches), np.float32), (rows, 1))
  return {
    "input_ids": row,
    "attention_mask": torch.ones_like(row),
    "mm_token_type_ids": (row == tokenizer.image_pad_id).int(),
    "pixel_values": torch.from_numpy(pixels),
    "image_grid_thw": torch.tensor(list(prompt.grids) * rows),
  }


def _tensors(model: Sa2VA, part: str, table: RuleTable) -> dict[str, Tensor]:
  params = {
    ".".join(map(str, path)): whole(np.asarray(variable.get_value(), np.float32))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    if path[0] == part and path[-1] not in ("lora_a", "lora_b")
  }
  renamed = rename(table, params, patch_kernel(model.config) if part == "qwen" else ())
  return {k: torch.from_numpy(np.array(a.read(0, a.shape[0]))) for k, a in renamed.items()}
