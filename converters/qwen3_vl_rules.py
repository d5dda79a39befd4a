"""Names of Qwen3-VL in Hugging Face checkpoints (transformers Qwen3VLForConditionalGeneration)."""

from converters.rules import Rule, RuleTable, Tied

STACKS = ("language_model.layers", "visual.blocks", "visual.deepstack_merger_list")


def qwen3_vl_rules(prefix: str, ours: str = "qwen.") -> tuple[Rule, ...]:
  """Rules of keys that start with `prefix`, all but the output embedding."""
  body = f"{prefix}model."
  names = (
    "language_model.embed_tokens.weight",
    "language_model.norm.weight",
    "visual.merger.{rest}",
    "visual.patch_embed.proj.bias",
    "visual.pos_embed.weight",
  )
  return (
    *(Rule(f"{body}{name}", f"{ours}{name}") for name in names),
    Rule(f"{body}visual.patch_embed.proj.weight", f"{ours}visual.patch_embed.proj.weight", "flat"),
    *(Rule(f"{body}{stack}.{{layer}}.{{rest}}", f"{ours}{stack}.{{rest}}") for stack in STACKS),
  )


def head_rules(
  prefix: str, tied: bool, ours: str = "qwen."
) -> tuple[tuple[Rule, ...], tuple[Tied, ...]]:
  """The output embedding: a tensor of its own, or a second copy of the input embedding."""
  head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.language_model.embed_tokens.weight"
  if tied:
    return (), (Tied(head, embedding),)
  return (Rule(head, f"{ours}language_model.lm_head.weight"),), ()


def qwen3_vl_table(tied: bool) -> RuleTable:
  """Plain Qwen3-VL-*-Instruct checkpoints."""
  head, ties = head_rules("", tied)
  return RuleTable((*qwen3_vl_rules(""), *head), tied=ties)
