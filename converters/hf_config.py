"""Sizes of a model in Hugging Face's config.json, in both directions."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from converters.config_reader import Reader
from converters.rules import raise_all
from vrt_jax.config import ImageConfig, ModelConfig, Sam2Config, TextConfig, VisionConfig, from_dict
from vrt_jax.data.chat import IM_END, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, ChatTokenizer

OWN_SECTION = "vrt_jax"
"""Key of config.json for what the reference's classes have as constants; they ignore it."""

REFERENCE_IMAGE = ImageConfig(
  min_pixels=512 * 28 * 28,
  max_pixels=2048 * 28 * 28,
  inference_factor_px=28,
  grounding_size_px=1024,
)
"""Preprocessing of the reference (Sa2VAChatModelQwen)."""


def qwen_config(config: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
  """Vision tower and text decoder of a Qwen3-VL config.json; `tie_embeddings` as it says.

  Raises:
    ValueError: one message with every field that is missing, malformed or not supported.
  """
  problems: list[str] = []
  top = Reader(config, "config.json", problems)
  v, t = top.section("vision_config"), top.section("text_config")
  v.fixed("hidden_act", "gelu_pytorch_tanh")
  v.fixed("in_channels", 3)
  t.fixed("hidden_act", "silu")
  t.fixed("attention_bias", False)
  rope = t.section("rope_parameters" if t.has("rope_parameters") else "rope_scaling")
  rope.fixed("mrope_interleaved", True)
  rope.fixed("rope_type", "default", "mrope")
  vision = VisionConfig(
    depth=v.number("depth"),
    hidden_size=v.number("hidden_size"),
    num_heads=v.number("num_heads"),
    intermediate_size=v.number("intermediate_size"),
    patch_size=v.number("patch_size"),
    temporal_patch_size=v.number("temporal_patch_size"),
    spatial_merge_size=v.number("spatial_merge_size"),
    num_position_embeddings=v.number("num_position_embeddings"),
    out_hidden_size=v.number("out_hidden_size"),
    deepstack_indexes=v.numbers("deepstack_visual_indexes"),
  )
  heads, hidden = t.number("num_attention_heads"), t.number("hidden_size")
  text = TextConfig(
    vocab_size=t.number("vocab_size"),
    hidden_size=hidden,
    num_layers=t.number("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=t.number("num_key_value_heads"),
    head_dim=t.number("head_dim") if t.has("head_dim") else hidden // heads,
    intermediate_size=t.number("intermediate_size"),
    rope_theta=(rope if rope.has("rope_theta") else t).number("rope_theta", float),
    mrope_section=rope.three_numbers("mrope_section")
    if rope.has("mrope_section")
    else (24, 20, 20),
    rms_norm_eps=t.number("rms_norm_eps", float),
    tie_embeddings=says_tied(config),
  )
  if sum(text.mrope_section) * 2 != text.head_dim and not problems:
    problems.append(
      f"config.json: mrope_section {list(text.mrope_section)} does not sum to half of head_dim"
      f" {text.head_dim}"
    )
  raise_all(problems)
  return vision, text


def says_tied(config: Mapping[str, Any]) -> bool:
  """Whether config.json ties the embeddings: no level says that it does not, and one that it does.

  transformers writes the flag at the top and in text_config; the reference's export sets both.
  """
  section = config.get("text_config")
  section = section if isinstance(section, dict) else {}
  flags = [c["tie_word_embeddings"] for c in (config, section) if "tie_word_embeddings" in c]
  return bool(flags) and all(flags)


def own_section(model: ModelConfig, image: ImageConfig) -> dict[str, Any]:
  """What `from_own_section` reads back."""
  return {
    "sam2": asdict(model.sam2),
    "seg_hidden": model.seg_hidden,
    "compute_dtype": model.compute_dtype,
    "image": asdict(image),
  }


def from_own_section(section: Mapping[str, Any]) -> tuple[dict[str, Any], ImageConfig]:
  """(fields of a ModelConfig, preprocessing) that `to_hf` wrote; ValueError where malformed."""
  where = f"config.json: {OWN_SECTION}"
  if missing := sorted({"sam2", "seg_hidden", "compute_dtype", "image"} - set(section)):
    raise ValueError(f"{where}: no {missing[0]}")
  fields = {
    "sam2": from_dict(Sam2Config, section["sam2"], f"{where}: sam2"),
    "seg_hidden": section["seg_hidden"],
    "compute_dtype": section["compute_dtype"],
  }
  return fields, from_dict(ImageConfig, section["image"], f"{where}: image")


def hf_config(
  model: ModelConfig, tokenizer: ChatTokenizer, dtype: str, original: Mapping[str, Any]
) -> dict[str, Any]:
  """A Qwen3-VL config.json of `model`; fields of `original` that say nothing about sizes stay.

  rope is written as transformers 4.57 reads it, which later versions understand.
  """
  v, t = model.vision, model.text
  vision = {
    "model_type": "qwen3_vl",
    "depth": v.depth,
    "hidden_size": v.hidden_size,
    "hidden_act": "gelu_pytorch_tanh",
    "num_heads": v.num_heads,
    "intermediate_size": v.intermediate_size,
    "in_channels": 3,
    "patch_size": v.patch_size,
    "temporal_patch_size": v.temporal_patch_size,
    "spatial_merge_size": v.spatial_merge_size,
    "num_position_embeddings": v.num_position_embeddings,
    "out_hidden_size": v.out_hidden_size,
    "deepstack_visual_indexes": list(v.deepstack_indexes),
  }
  text = {
    "model_type": "qwen3_vl_text",
    "vocab_size": t.vocab_size,
    "hidden_size": t.hidden_size,
    "hidden_act": "silu",
    "num_hidden_layers": t.num_layers,
    "num_attention_heads": t.num_heads,
    "num_key_value_heads": t.num_kv_heads,
    "head_dim": t.head_dim,
    "intermediate_size": t.intermediate_size,
    "attention_bias": False,
    "rms_norm_eps": t.rms_norm_eps,
    "rope_theta": t.rope_theta,
    "rope_scaling": {
      "rope_type": "default",
      "mrope_interleaved": True,
      "mrope_section": list(t.mrope_section),
    },
    "tie_word_embeddings": t.tie_embeddings,
    "dtype": dtype,
  }
  kept_text = {k: w for k, w in original.get("text_config", {}).items() if k != "rope_parameters"}
  return {
    **original,
    "dtype": dtype,
    "tie_word_embeddings": t.tie_embeddings,
    "image_token_id": tokenizer.token_id(IMAGE_PAD),
    "video_token_id": tokenizer.token_id(VIDEO_PAD),
    "vision_start_token_id": tokenizer.token_id(VISION_START),
    "vision_end_token_id": tokenizer.token_id(VISION_END),
    "eos_token_id": tokenizer.token_id(IM_END),
    "vision_config": original.get("vision_config", {}) | vision,
    "text_config": kept_text | text,
  }
