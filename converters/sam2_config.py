"""SAM 2's sizes from tensors, and in transformers' config.json."""

from collections.abc import Mapping
from typing import Any

from converters.config_reader import Reader
from converters.rules import Shape, raise_all
from vrt_jax.config import Sam2Config
from vrt_jax.sizes import SAM2_SIZES


def sam2_from_hf(config: Mapping[str, Any]) -> Sam2Config:
  """SAM 2's sizes in transformers' config.json (Sam2Config, Sam2VideoConfig).

  Raises:
    ValueError: one message with every field that is missing or malformed.
  """
  problems: list[str] = []
  top = Reader(config, "config.json", problems)
  vision, decoder = top.section("vision_config"), top.section("mask_decoder_config")
  trunk, prompt = vision.section("backbone_config"), top.section("prompt_encoder_config")
  trunk.fixed("hidden_act", "gelu")
  trunk.fixed("mlp_ratio", 4.0, 4)
  decoder.fixed("hidden_act", "gelu", "relu")
  decoder.fixed("attention_downsample_rate", 2)
  background = "window_positional_embedding_background_size"
  stages = trunk.numbers("blocks_per_stage")
  sides = trunk.numbers(background) or (1,)  # of rows and columns, or of both
  sam2 = Sam2Config(
    image_size_px=prompt.number("image_size"),
    embed_dim=trunk.number("hidden_size"),
    num_heads=trunk.number("num_attention_heads"),
    stages=stages,
    global_attention_blocks=trunk.numbers("global_attention_blocks"),
    window_spec=trunk.numbers("window_size_per_stage"),
    window_pos_embed_background_size=(sides[0], sides[-1]),
    d_model=decoder.number("hidden_size"),
    decoder_depth=decoder.number("num_hidden_layers"),
    decoder_num_heads=decoder.number("num_attention_heads"),
    decoder_mlp_dim=decoder.number("mlp_dim"),
    num_multimask_outputs=decoder.number("num_multimask_outputs"),
    iou_head_hidden_dim=decoder.number("iou_head_hidden_dim"),
  )
  raise_all(problems)
  return sam2


def sam2_from_shapes(
  shapes: Mapping[str, Shape], prefix: str = "", lost: frozenset[str] = frozenset()
) -> Sam2Config:
  """The released size that Meta's tensors have, by the trunk's width and number of blocks.

  Names in `lost` count as blocks; where the width is among them, the blocks alone tell.

  Raises:
    ValueError: they have none of the four sizes.
  """
  trunk = f"{prefix}image_encoder.trunk."
  names = {*shapes, *lost}
  first = f"{trunk}patch_embed.proj.bias"
  width = shapes.get(first, (0,))[0]
  depth = sum(key.startswith(f"{trunk}blocks.") and key.endswith(".norm1.bias") for key in names)
  for config in SAM2_SIZES.values():
    if sum(config.stages) == depth and (first in lost or config.embed_dim == width):
      return config
  known = ", ".join(f"{name} {c.embed_dim} x {sum(c.stages)}" for name, c in SAM2_SIZES.items())
  raise ValueError(f"a SAM 2 trunk of width {width} and {depth} blocks is none of {known}")


def sam2_hf_config(sam2: Sam2Config, dtype: str) -> dict[str, Any]:
  """transformers' config.json of a Sam2Model."""
  widths = [sam2.embed_dim * 2**i for i in range(4)]
  side = sam2.mask_size
  trunk = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": sam2.embed_dim,
    "num_attention_heads": sam2.num_heads,
    "image_size": [sam2.image_size_px] * 2,
    "blocks_per_stage": list(sam2.stages),
    "embed_dim_per_stage": widths,
    "num_attention_heads_per_stage": [sam2.num_heads * 2**i for i in range(4)],
    "window_size_per_stage": list(sam2.window_spec),
    "global_attention_blocks": list(sam2.global_attention_blocks),
    "window_positional_embedding_background_size": list(sam2.window_pos_embed_background_size),
  }
  return {
    "model_type": "sam2",
    "architectures": ["Sam2Model"],
    "dtype": dtype,
    "vision_config": {
      "model_type": "sam2_vision_model",
      "backbone_config": trunk,
      "backbone_channel_list": widths[::-1],
      "backbone_feature_sizes": [[side // 2**i] * 2 for i in range(3)],
      "fpn_hidden_size": sam2.d_model,
    },
    "prompt_encoder_config": {"hidden_size": sam2.d_model, "image_size": sam2.image_size_px},
    "mask_decoder_config": {
      "hidden_size": sam2.d_model,
      "mlp_dim": sam2.decoder_mlp_dim,
      "num_hidden_layers": sam2.decoder_depth,
      "num_attention_heads": sam2.decoder_num_heads,
      "num_multimask_outputs": sam2.num_multimask_outputs,
      "iou_head_hidden_dim": sam2.iou_head_hidden_dim,
    },
  }
