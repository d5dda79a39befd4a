"""Tiny random PyTorch Sa2VAs and the road of their weights into ours."""

import jax.numpy as jnp
import torch
from flax import nnx

from converters.torch_reference import TorchSa2VA
from tests.parity import qwen3_vl_weights, sam2_weights
from vrt_jax.config import ModelConfig
from vrt_jax.models.sa2va import Sa2VA


def random_fcs(hidden_size: int, d_model: int) -> torch.nn.Sequential:
  """`text_hidden_fcs`; prompts are large, so that masks differ from [SEG] to [SEG]."""
  fcs = torch.nn.Sequential(
    torch.nn.Linear(hidden_size, hidden_size),
    torch.nn.ReLU(),
    torch.nn.Linear(hidden_size, d_model),
  )
  with torch.no_grad():
    for layer, gain in ((fcs[0], 1.0), (fcs[2], 4.0)):
      layer.weight.copy_(gain * torch.randn(layer.weight.shape) * layer.in_features**-0.5)
      layer.bias.copy_(0.2 * torch.randn(layer.bias.shape))
  return fcs


def random_torch_sa2va(config: ModelConfig, image_token_id: int, seed: int = 0) -> TorchSa2VA:
  """The reference's three parts, every parameter random."""
  hf_config = qwen3_vl_weights.hf_config(config, image_token_id)
  return TorchSa2VA(
    qwen3_vl_weights.random_torch_model(hf_config, seed),
    random_fcs(config.text.hidden_size, config.sam2.d_model),
    sam2_weights.random_torch_model(config.sam2, seed),
  )


def our_sa2va(config: ModelConfig, theirs: TorchSa2VA) -> Sa2VA:
  """Our model (without LoRA) with every parameter from torch."""
  model = nnx.eval_shape(lambda: Sa2VA(config, nnx.Rngs(0)))
  qwen3_vl_weights.load_weights(model.qwen, theirs.qwen.state_dict())
  model.sam2 = sam2_weights.load_torch(config.sam2, theirs.sam2.state_dict())
  ours = model.text_hidden_fcs
  for layer, index in ((ours.fc1, 0), (ours.fc2, 2)):
    source = theirs.text_hidden_fcs[index]
    layer.weight.set_value(jnp.asarray(source.weight.detach().numpy()))
    layer.bias.set_value(jnp.asarray(source.bias.detach().numpy()))
  return model
