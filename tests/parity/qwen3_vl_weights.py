"""Tiny random transformers Qwen3-VLs and the road of their weights into ours."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vrt_jax.config import ModelConfig
from vrt_jax.models.qwen3_vl.model import Qwen3VL

STACKS = ("visual.blocks.", "visual.deepstack_merger_list.", "language_model.layers.")


def hf_config(config: ModelConfig, image_token_id: int) -> Qwen3VLConfig:
  """The transformers configuration of the same model."""
  vision, text = config.vision, config.text
  return Qwen3VLConfig(
    vision_config={
      "depth": vision.depth,
      "hidden_size": vision.hidden_size,
      "num_heads": vision.num_heads,
      "intermediate_size": vision.intermediate_size,
      "patch_size": vision.patch_size,
      "num_position_embeddings": vision.num_position_embeddings,
      "out_hidden_size": vision.out_hidden_size,
      "deepstack_visual_indexes": list(vision.deepstack_indexes),
    },
    text_config={
      "vocab_size": text.vocab_size,
      "hidden_size": text.hidden_size,
      "num_hidden_layers": text.num_layers,
      "num_attention_heads": text.num_heads,
      "num_key_value_heads": text.num_kv_heads,
      "head_dim": text.head_dim,
      "rms_norm_eps": text.rms_norm_eps,
      "intermediate_size": text.intermediate_size,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section),
        "mrope_interleaved": True,
      },
    },
    image_token_id=image_token_id,
    video_token_id=image_token_id + 1,
    tie_word_embeddings=text.tie_embeddings,
  )


def random_torch_model(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
  """A model in which no parameter keeps its initial value: norms near one, biases not zero."""
  torch.manual_seed(seed)
  model = Qwen3VLForConditionalGeneration(config).eval()
  for name, parameter in model.named_parameters():
    noise = torch.randn_like(parameter)
    is_norm = "norm" in name and name.endswith("weight")
    width = parameter[0].numel() if parameter.ndim > 1 else 25
    parameter.data = 1 + 0.2 * noise if is_norm else noise * width**-0.5
  return model


def source_keys(path: tuple, leading: int) -> list[str]:
  """The torch keys of one of our parameters: one a layer for stacked ones, else a single one."""
  name = ".".join(map(str, path))
  if name == "language_model.lm_head.weight":
    return ["lm_head.weight"]
  for prefix in STACKS:
    if name.startswith(prefix):
      return [f"model.{prefix}{i}.{name.removeprefix(prefix)}" for i in range(leading)]
  return [f"model.{name}"]


def source_shapes(model: Qwen3VL, state_dict: dict[str, torch.Tensor]) -> dict[str, tuple]:
  """Our parameter name -> (our shape, shape made of the torch tensors); every key used once."""
  shapes, used = {}, []
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    keys = source_keys(path, leaf.shape[0])
    used += keys
    first = tuple(state_dict[keys[0]].shape)
    if path[-3:-1] == ("patch_embed", "proj") and len(first) == 5:
      first = (first[0], int(np.prod(first[1:])))
    shapes[".".join(map(str, path))] = (leaf.shape, (len(keys), *first)[-len(leaf.shape) :])
  left = set(state_dict) - set(used)
  tied = model.language_model.lm_head is None
  assert left == ({"lm_head.weight"} if tied else set()), left
  assert len(used) == len(set(used))
  return shapes


def load_weights(model: Qwen3VL, state_dict: dict[str, torch.Tensor]) -> None:
  """Fills every parameter of `model`, abstract or not, in place; names and shapes must match."""
  for name, (ours, theirs) in source_shapes(model, state_dict).items():
    assert ours == theirs, (name, ours, theirs)
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  for path, leaf in flat:
    keys = source_keys(path, leaf.shape[0])
    value = np.stack([state_dict[key].float().numpy() for key in keys])
    leaf.set_value(jnp.asarray(value.reshape(leaf.shape)))
  nnx.update(model, nnx.from_flat_state(flat))
