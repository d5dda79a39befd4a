"""Tiny random transformers Sam2Models and the road of their weights into ours."""

import re

import jax.numpy as jnp
import torch
from flax import nnx
from transformers import Sam2Config as HfSam2Config
from transformers import Sam2Model
from transformers.models.sam2.configuration_sam2 import (
  Sam2HieraDetConfig,
  Sam2MaskDecoderConfig,
  Sam2PromptEncoderConfig,
  Sam2VisionConfig,
)

from vrt_jax.config import Sam2Config
from vrt_jax.models.sam2.model import Sam2

RENAMES = [
  (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
  (r"^vision_encoder\.neck\.", "image_encoder.neck."),
  (r"patch_embed\.projection\.", "patch_embed."),
  (r"\.layer_norm(\d)\.", r".norm\1."),
  (r"layer_norm_final_attn", "norm_final_attn"),
  (r"\.o_proj\.", ".out_proj."),
  (r"((?:\.|^)mlp)\.proj_in\.", r"\1.layers.0."),
  (r"((?:\.|^)mlp)\.proj_out\.", r"\1.layers.1."),
  (r"(mlps\.\d|_head)\.layers\.0\.", r"\1.layers.1."),
  (r"(mlps\.\d|_head)\.proj_in\.", r"\1.layers.0."),
  (r"(mlps\.\d|_head)\.proj_out\.", r"\1.layers.2."),
  (r"upscale_conv1\.", "output_upscaling.0."),
  (r"upscale_layer_norm\.", "output_upscaling.1."),
  (r"upscale_conv2\.", "output_upscaling.2."),
  (r"mask_embed\.conv1\.", "mask_downscaling.0."),
  (r"mask_embed\.norm1\.", "mask_downscaling.1."),
  (r"mask_embed\.conv2\.", "mask_downscaling.2."),
  (r"mask_embed\.norm2\.", "mask_downscaling.3."),
  (r"mask_embed\.conv3\.", "mask_downscaling.4."),
  (
    r"shared_embedding\.positional_embedding",
    "pe_layer.positional_encoding_gaussian_matrix",
  ),
  (r"^no_memory_embedding$", "no_mem_embed"),
]
SECOND_COPY = "shared_image_embedding.positional_embedding"


def hf_config(config: Sam2Config) -> HfSam2Config:
  """The transformers configuration of the same model."""
  widths = [config.embed_dim * 2**i for i in range(4)]
  side = config.mask_size
  backbone = Sam2HieraDetConfig(
    hidden_size=config.embed_dim,
    num_attention_heads=config.num_heads,
    image_size=[config.image_size_px] * 2,
    blocks_per_stage=list(config.stages),
    embed_dim_per_stage=widths,
    num_attention_heads_per_stage=[config.num_heads * 2**i for i in range(4)],
    window_size_per_stage=list(config.window_spec),
    global_attention_blocks=list(config.global_attention_blocks),
    window_positional_embedding_background_size=list(config.window_pos_embed_background_size),
  )
  vision = Sam2VisionConfig(
    backbone_config=backbone,
    backbone_channel_list=widths[::-1],
    backbone_feature_sizes=[[side // 2**i] * 2 for i in range(3)],
    fpn_hidden_size=config.d_model,
  )
  prompt = Sam2PromptEncoderConfig(hidden_size=config.d_model, image_size=config.image_size_px)
  decoder = Sam2MaskDecoderConfig(
    hidden_size=config.d_model,
    mlp_dim=config.decoder_mlp_dim,
    num_hidden_layers=config.decoder_depth,
    num_attention_heads=config.decoder_num_heads,
    num_multimask_outputs=config.num_multimask_outputs,
    iou_head_hidden_dim=config.iou_head_hidden_dim,
    dynamic_multimask_via_stability=False,
  )
  return HfSam2Config(
    vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
  )


def random_torch_model(config: Sam2Config, seed: int = 0) -> Sam2Model:
  """Every parameter and the Fourier matrix random, norms and biases too.

  The mask decoder's biases are small, so that the prompt has a say in its masks.
  """
  model = Sam2Model(hf_config(config)).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.state_dict().items():
      noise = torch.randn(value.shape, generator=generator)
      if "norm" in name and name.endswith("weight"):
        value.copy_(1 + 0.3 * noise)
      elif value.ndim >= 2 and name.endswith("weight") and "embed." not in name:
        fan_in = value.shape[0] if "upscale_conv" in name else value[0].numel()
        value.copy_(noise * fan_in**-0.5)
      elif name.startswith("mask_decoder") and name.endswith("bias"):
        value.copy_(0.1 * noise)
      else:
        value.copy_(0.5 * noise)
    for name in ("iou_token", "mask_tokens", "obj_score_token"):
      module = model.mask_decoder.get_submodule(name)
      module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    model.shared_image_embedding.positional_embedding.copy_(
      model.prompt_encoder.shared_embedding.positional_embedding
    )
  return model


def balance_iou_head(model: Sam2Model, iou: torch.Tensor) -> None:
  """Makes the masks compete, in place: which one is best then depends on the prompt.

  `iou` [.., K] is what the head gives so far for the last K masks; their mean logits are taken off
  its last bias.
  """
  with torch.no_grad():
    bias = model.mask_decoder.iou_prediction_head.proj_out.bias
    bias[-iou.shape[-1] :] -= iou.reshape(-1, iou.shape[-1]).logit().mean(dim=0)


def our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """transformers' keys -> dotted paths of `Sam2`; 1x1 convolutions become matrices."""
  out = {}
  for name, value in state.items():
    if name == SECOND_COPY:
      continue
    for pattern, replacement in RENAMES:
      name = re.sub(pattern, replacement, name)
    if name == "prompt_encoder.point_embed.weight":
      for i in range(4):
        out[f"prompt_encoder.point_embeddings.{i}.weight"] = value[i : i + 1]
      continue
    out[name] = value[:, :, 0, 0] if value.shape[2:] == (1, 1) and value.ndim == 4 else value
  return out


def load_torch(config: Sam2Config, state: dict[str, torch.Tensor]) -> Sam2:
  """A model with every parameter from torch; raises where names or shapes differ."""
  graph, abstract = nnx.split(nnx.eval_shape(lambda: Sam2(config, nnx.Rngs(0))))
  leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
  source = our_names(state)
  if leaves.keys() != source.keys():
    raise ValueError(f"names differ: {sorted(leaves.keys() ^ source.keys())}")
  for name, leaf in leaves.items():
    if leaf.shape != tuple(source[name].shape):
      raise ValueError(f"{name}: {leaf.shape} here, {tuple(source[name].shape)} in torch")
  filled = [
    (path, leaf.replace(jnp.asarray(source[".".join(map(str, path))].detach().numpy())))
    for path, leaf in nnx.to_flat_state(abstract)
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))
