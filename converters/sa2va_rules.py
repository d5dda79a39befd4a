"""Names of R-Sa2VA and Sa2VA-Qwen3-VL exports (reference: Sa2VAChatModelQwen, convert_to_hf.py)."""

import re

from converters.qwen3_vl_rules import head_rules, qwen3_vl_rules
from converters.rules import Ignored, Rule, RuleTable
from converters.sam2_rules import MEMORY, VIDEO_MEMORY, meta_rules

SAM2_PREFIX = "grounding_encoder.sam2_model."
QWEN_PREFIX = "model."

TEXT_HIDDEN_FCS = (
  Rule("text_hidden_fcs.0.{rest}", "text_hidden_fcs.fc1.{rest}"),
  Rule("text_hidden_fcs.2.{rest}", "text_hidden_fcs.fc2.{rest}"),
)


def sa2va_table(tied: bool) -> RuleTable:
  """The export's names; `tied` where it has no output embedding of its own."""
  head, ties = head_rules(QWEN_PREFIX, tied)
  rules = (*qwen3_vl_rules(QWEN_PREFIX), *head, *TEXT_HIDDEN_FCS, *meta_rules(SAM2_PREFIX))
  return RuleTable(rules, (Ignored(f"{re.escape(SAM2_PREFIX)}({VIDEO_MEMORY})", MEMORY),), ties)


def export_name(meta_key: str) -> str:
  """Meta's name of a SAM 2 tensor as the export has it."""
  return SAM2_PREFIX + meta_key.replace(".gamma", ".g_weight")
