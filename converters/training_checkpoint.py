"""Names in the reference's training checkpoints (.pth): Sa2VAModel with PEFT adapters.

    mllm.model.base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight
    mllm.model.base_model.model.lm_head.modules_to_save.default.weight
    grounding_encoder.sam2_model.sam_mask_decoder.iou_token.weight
    text_hidden_fcs.0.weight

become the names of an export, adapters `lora_A.weight` and `lora_B.weight` beside them. Source:
Sa2VA projects/sa2va/models/sa2va.py and tools/convert_to_hf.py, PEFT's LoraModel.
"""

import re

from converters.rules import Rule, RuleTable

_LAYERS = "model.model.language_model.layers.{layer}.{rest}"
ADAPTERS = RuleTable(
  (
    Rule(f"{_LAYERS}.lora_A.weight", "qwen.language_model.layers.{rest}.lora_a"),
    Rule(f"{_LAYERS}.lora_B.weight", "qwen.language_model.layers.{rest}.lora_b"),
  )
)
PEFT_PREFIX = "base_model.model."
"""Before every name in a PEFT adapter of Qwen3VLForConditionalGeneration."""

_REPLACEMENTS = (
  (r"^module\.", ""),
  (r"^mllm\.", ""),
  (r"^model\.base_model\.model\.", "model."),
  (r"\.base_layer\.", "."),
  (r"\.modules_to_save\.(?:\w+\.)?weight$", ".weight"),
  (r"\.lora_([AB])\.(?:\w+\.)?weight$", r".lora_\1.weight"),
  (r"\.gamma$", ".g_weight"),
)
_FROZEN_COPY = ".original_module."


def is_adapter(key: str) -> bool:
  """Whether an export's name is one of LoRA's matrices."""
  return key.endswith((".lora_A.weight", ".lora_B.weight"))


def is_training_checkpoint(keys: list[str]) -> bool:
  """Whether the keys come from the reference's training."""
  return any(key.removeprefix("module.").startswith(("mllm.", "text_hidden_fcs.")) for key in keys)


def export_names(keys: list[str]) -> tuple[dict[str, str], list[str]]:
  """Export's name -> key, and the keys that are the frozen copies of trained embeddings.

  Raises:
    ValueError: two keys have one name.
  """
  names: dict[str, str] = {}
  frozen = [key for key in keys if _FROZEN_COPY in key]
  for key in keys:
    if key in frozen:
      continue
    name = key
    for pattern, replacement in _REPLACEMENTS:
      name = re.sub(pattern, replacement, name)
    if name in names:
      raise ValueError(f"{names[name]} and {key} are both {name}")
    names[name] = key
  return names, frozen
