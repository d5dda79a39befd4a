"""A group of samples by transformers' generate, from the weights of a model of ours."""

from collections.abc import Callable

import numpy as np
import torch
from flax import nnx
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from converters.export import patch_kernel, rename
from converters.hf_config import hf_config
from converters.qwen3_vl_rules import qwen3_vl_table
from converters.streams import whole
from vrt_jax.config import GrpoConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.image import normalize_patches
from vrt_jax.data.transforms import Prompt
from vrt_jax.models.sa2va import Sa2VA


def torch_group(
  model: Sa2VA, prompt: Prompt, tokenizer: ChatTokenizer, grpo: GrpoConfig
) -> Callable[[], np.ndarray]:
  """A function that gives the new tokens [G, N] of one prompt; no sample ends before N.

  Temperature 0 is greedy.
  """
  config = Qwen3VLConfig(**hf_config(model.config, tokenizer, "float32", {}))
  theirs = Qwen3VLForConditionalGeneration(config).eval()
  params = {
    ".".join(map(str, path)): whole(np.asarray(v.get_value()))
    for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    if path[0] == "qwen"
  }
  tied = model.config.text.tie_embeddings
  renamed = rename(qwen3_vl_table(tied), params, patch_kernel(model.config))
  state = {k: torch.from_numpy(np.array(a.read(0, a.shape[0]))) for k, a in renamed.items()}
  if tied:
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
  theirs.load_state_dict(state)
  row = torch.tensor(np.asarray(prompt.input_ids, np.int64))[None]
  inputs = {
    "input_ids": row,
    "attention_mask": torch.ones_like(row),
    "mm_token_type_ids": (row == tokenizer.image_pad_id).int(),
    "pixel_values": torch.from_numpy(np.asarray(normalize_patches(prompt.patches), np.float32)),
    "image_grid_thw": torch.tensor(prompt.grids),
  }

  def run() -> np.ndarray:
    with torch.no_grad():
      out = theirs.generate(
        **inputs,
        do_sample=True,
        temperature=grpo.temperature or 1.0,
        top_p=grpo.top_p,
        top_k=0 if grpo.temperature else 1,
        num_return_sequences=grpo.group_size,
        min_new_tokens=grpo.max_new_tokens,
        max_new_tokens=grpo.max_new_tokens,
        eos_token_id=tokenizer.im_end_id,
        pad_token_id=tokenizer.endoftext_id,
        suppress_tokens=list(tokenizer.never_sample_ids),
      )
    return out[:, row.shape[1] :].numpy()

  return run
