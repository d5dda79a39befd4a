"""The small files of a Hugging Face folder: template, processor, generation settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vrt_jax.config import ImageConfig, Sam2Config
from vrt_jax.data.chat import (
  ENDOFTEXT,
  IM_END,
  IM_START,
  IMAGE_PAD,
  VIDEO_PAD,
  VISION_END,
  VISION_START,
  ChatTokenizer,
)

OWN_FILES = ("config.json", "ties.json", "tensors.safetensors", "conversion.json")
"""Files of `carried/` that are made anew or are not the checkpoint's."""

CHAT_TEMPLATE = (
  "{%- for message in messages %}"
  f"{{{{- '{IM_START}' + message.role + '\\n' }}}}"
  "{%- if message.content is string %}{{- message.content }}{%- else %}"
  "{%- for part in message.content %}"
  "{%- if part.type == 'image' or 'image' in part %}"
  f"{{{{- '{VISION_START}{IMAGE_PAD}{VISION_END}' }}}}"
  "{%- elif part.type == 'video' or 'video' in part %}"
  f"{{{{- '{VISION_START}{VIDEO_PAD}{VISION_END}' }}}}"
  "{%- elif 'text' in part %}{{- part.text }}{%- endif %}"
  "{%- endfor %}{%- endif %}"
  f"{{{{- '{IM_END}\\n' }}}}"
  "{%- endfor %}"
  f"{{%- if add_generation_prompt %}}{{{{- '{IM_START}assistant\\n' }}}}{{%- endif %}}"
)
"""Turns without a system turn, pictures as one pad token that the processor repeats."""


def original_config(carried: Path | None) -> dict[str, Any]:
  """config.json of the checkpoint that a model was converted from; {} without one."""
  file = carried / "config.json" if carried else None
  if file is None or not file.is_file():
    return {}
  config = json.loads(file.read_text(encoding="utf-8"))
  return config if config.get("model_type") == "sa2va_chat" else {}


def sa2va_section(original: Mapping[str, Any], remote_code: str) -> dict[str, Any]:
  """Fields that make transformers take the reference's classes; those of `original` first.

  A model that was not converted from an export has no modelling files with it, so its auto_map
  names the hub repository that does.
  """
  code = "" if original.get("auto_map") else f"{remote_code}--"
  model = f"{code}modeling_sa2va_qwen.Sa2VAChatModelQwen"
  return {
    "model_type": "sa2va_chat",
    "architectures": ["Sa2VAChatModelQwen"],
    "template": original.get("template", "qwen_chat"),
    "auto_map": original.get("auto_map")
    or {
      "AutoConfig": f"{code}configuration_sa2va_chat.Sa2VAChatConfigQwen",
      "AutoModel": model,
      "AutoModelForCausalLM": model,
    },
  }


def processor_files(image: ImageConfig, tokenizer: ChatTokenizer) -> dict[str, dict | str]:
  """File name -> content: image processor, chat template, generation settings."""
  statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
  sizes = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
  return {
    "preprocessor_config.json": {
      "image_processor_type": "Qwen2VLImageProcessorFast",
      "processor_class": "Qwen3VLProcessor",
      "patch_size": image.patch_size,
      "temporal_patch_size": image.temporal_patch_size,
      "merge_size": image.merge_size,
      "size": sizes,
      "min_pixels": image.min_pixels,
      "max_pixels": image.max_pixels,
      **statistics,
    },
    "video_preprocessor_config.json": {
      "video_processor_type": "Qwen3VLVideoProcessor",
      "processor_class": "Qwen3VLProcessor",
      "patch_size": image.patch_size,
      "temporal_patch_size": image.temporal_patch_size,
      "merge_size": image.merge_size,
      "size": sizes,
      **statistics,
    },
    "chat_template.jinja": CHAT_TEMPLATE,
    "generation_config.json": {
      "do_sample": False,
      "eos_token_id": tokenizer.token_id(IM_END),
      "pad_token_id": tokenizer.token_id(ENDOFTEXT),
    },
  }


def sam2_processor(sam2: Sam2Config) -> dict[str, Any]:
  """preprocessor_config.json of transformers' Sam2Processor."""
  return {
    "image_processor_type": "Sam2ImageProcessorFast",
    "processor_class": "Sam2Processor",
    "size": {"height": sam2.image_size_px, "width": sam2.image_size_px},
    "mask_size": {"height": sam2.mask_size, "width": sam2.mask_size},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
  }
