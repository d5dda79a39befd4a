"""Copies a transformers Qwen3VLForConditionalGeneration state dict into our modules."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from vrt_jax.models.qwen3_vl.model import Qwen3VL

STACKS = ("visual.blocks.", "visual.deepstack_merger_list.", "language_model.layers.")


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
