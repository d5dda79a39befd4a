"""The checkpoints that `from_hf` reads, told apart by their content, each as a `Conversion`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters import conversion, hf_config, sam2_config, sam2_rules
from converters.config_reader import read_config
from converters.conversion import Conversion
from converters.params_reader import StoredParams
from converters.qwen3_vl_rules import qwen3_vl_table
from converters.rules import RuleTable, all_of, problems_of, raise_all
from converters.sa2va_rules import SAM2_PREFIX, export_name, sa2va_table
from converters.streams import Checksums, merge_adapters
from converters.tensor_files import Renamed, Resized, TensorSource, TorchFiles, open_folder
from converters.training_checkpoint import (
  ADAPTERS,
  export_names,
  is_adapter,
  is_training_checkpoint,
)
from vrt_jax import model_directory
from vrt_jax.config import (
  ComputeDtype,
  ImageConfig,
  LoraConfig,
  ModelConfig,
  Sam2Config,
  SegHidden,
)
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.sizes import SAM2_SIZES

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAM2_KINDS = ("sam2", "sam2_video")
EMBEDDING = "model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Options:
  """What a checkpoint itself does not say."""

  sam2: Path | None = None
  """SAM 2 checkpoint of a plain Qwen3-VL."""
  base: str = ""
  """Model directory that a training checkpoint goes on top of."""
  lora: str = "merge"
  lora_alpha: float | None = None
  seg_hidden: SegHidden = "pre_norm"
  seed: int = 0


def read_checkpoint(src: Path, options: Options) -> Conversion:
  """The conversion of a folder or file.

  Raises:
    ValueError: it is no checkpoint of a known kind, or with every problem of its tensors.
  """
  if src.is_file() and src.suffix in TORCH_SUFFIXES:
    source = TorchFiles([src])
    if is_training_checkpoint(list(source.shapes)):
      return training_checkpoint(source, options)
    return meta_sam2(source)
  config = _config_of(src)
  kind = config.get("model_type")
  if kind == "sa2va_chat":
    return sa2va_export(src, config, options)
  if kind == "qwen3_vl":
    return plain_qwen(src, config, options)
  if kind in SAM2_KINDS:
    return hf_sam2(src, config)
  raise ValueError(
    f"{src / 'config.json'}: model_type {kind!r} is none of sa2va_chat, qwen3_vl, sam2, sam2_video"
  )


def read_sam2(src: Path) -> Conversion:
  """The conversion of a checkpoint of SAM 2 alone; ValueError where it is another or bad."""
  if src.is_file() and src.suffix in TORCH_SUFFIXES:
    return meta_sam2(TorchFiles([src]))
  config = _config_of(src)
  if config.get("model_type") not in SAM2_KINDS:
    raise ValueError(f"{src} is no checkpoint of SAM 2 alone")
  return hf_sam2(src, config)


def _config_of(src: Path) -> dict:
  if not src.is_dir():
    raise ValueError(f"{src} is neither a folder nor a {', '.join(TORCH_SUFFIXES)} file")
  return read_config(src)


def _open_language_model(src: Path, config: dict, table: RuleTable) -> list:
  """[tensors, (vision, text) sizes, tokenizer] of a folder.

  Raises:
    ValueError: config.json or the tokenizer is bad; the problems of the tensors that show without
      them are listed with theirs.
  """
  source = open_folder(src)
  try:
    return [
      source,
      *all_of(lambda: hf_config.qwen_config(config), lambda: ChatTokenizer.from_dir(src)),
    ]
  except ValueError as error:
    raise_all(conversion.unknown_names(table, source) + problems_of(error))
    raise


def sa2va_export(src: Path, config: dict, options: Options) -> Conversion:
  """R-Sa2VA and Sa2VA-Qwen3-VL exports."""
  table = sa2va_table(hf_config.says_tied(config))
  source, (vision, text), tokenizer = _open_language_model(src, config, table)
  section = config.get(hf_config.OWN_SECTION)
  if section is None:
    fields: dict[str, Any] = {
      "sam2": _released_sam2(source, SAM2_PREFIX),
      "seg_hidden": options.seg_hidden,
      "compute_dtype": compute_dtype(source),
    }
    image = hf_config.REFERENCE_IMAGE
  else:
    fields, image = hf_config.from_own_section(section)
  model = ModelConfig(vision=vision, text=text, **fields)
  shapes, axes = conversion.expected_sa2va(model)
  checksums = Checksums()
  (params, ignored), _ = all_of(
    lambda: conversion.convert_tensors(table, source, shapes, checksums),
    lambda: check_vocabulary(tokenizer, text.vocab_size),
  )
  result = Conversion(
    model.sam2, params, axes, checksums, model, tokenizer=tokenizer, ignored=ignored
  )
  result.image = fit_image(image, model)
  memory = [key for key, reason in ignored.items() if reason == sam2_rules.MEMORY]
  result.carried = conversion.carry(source, {key: key for key in memory})
  result.ties = {tie.copy: tie.original for tie in table.tied if tie.copy in ignored}
  return result


def plain_qwen(src: Path, config: dict, options: Options) -> Conversion:
  """Qwen3-VL-*-Instruct: Sa2VA's heads are new, the five tokens are added."""
  table = qwen3_vl_table(hf_config.says_tied(config))
  stored, (vision, text), tokenizer = _open_language_model(src, config, table)
  num_rows = tokenizer.vocab_size
  head = "lm_head.weight"
  if head not in {*stored.shapes, *stored.lost} and not text.tie_embeddings:
    raise ValueError(f"{src}: no {head}, and config.json does not tie it to the embeddings")
  source = Resized(stored, [k for k in (EMBEDDING, head) if k in stored.shapes], num_rows)
  checksums = Checksums()
  if options.sam2 is None:
    sizes = SAM2_SIZES["large"]
    params = conversion.fresh_sam2(sizes, options.seed)
    axes = conversion.expected_sam2(sizes)[1]
    sam2 = Conversion(sizes, params, axes, checksums)
    sam2.notes.append("SAM 2 (large) is untrained: --sam2 takes a checkpoint")
  else:
    sam2 = read_sam2(options.sam2)
  model = ModelConfig(
    vision=vision,
    text=replace(text, vocab_size=num_rows),
    sam2=sam2.sam2,
    seg_hidden=options.seg_hidden,
    compute_dtype=compute_dtype(stored),
  )
  shapes, axes = conversion.expected_sa2va(model)
  params, ignored = conversion.convert_tensors(
    table,
    source,
    conversion.part_of(shapes, "qwen."),
    checksums,
  )
  params |= conversion.fresh_heads(model, options.seed)
  result = Conversion(sam2.sam2, params, axes, checksums, model, tokenizer=tokenizer)
  result.image = fit_image(hf_config.REFERENCE_IMAGE, model)
  result.ignored = ignored
  result.notes = [
    f"embeddings: {text.vocab_size} rows in the checkpoint, {num_rows} for the tokenizer",
    "text_hidden_fcs is untrained",
  ]
  result.absorb(sam2)
  return result


def meta_sam2(source: TensorSource) -> Conversion:
  """Meta's SAM 2 and 2.1 checkpoints, any of the four sizes."""
  result = _sam2_alone(_released_sam2(source), sam2_rules.META, source)
  memory = [key for key, reason in result.ignored.items() if reason == sam2_rules.MEMORY]
  result.carried = conversion.carry(source, {key: export_name(key) for key in memory})
  return result


def _released_sam2(source: TensorSource, prefix: str = "") -> Sam2Config:
  """The released size that Meta's tensors have; ValueError where they have none."""
  try:
    return sam2_config.sam2_from_shapes(source.shapes, prefix, source.lost)
  except ValueError as error:
    raise_all([*source.problems, str(error)] if source.shapes else source.problems)
    raise


def hf_sam2(src: Path, config: dict) -> Conversion:
  """transformers' Sam2Model and Sam2VideoModel."""
  sizes, source = all_of(lambda: sam2_config.sam2_from_hf(config), lambda: open_folder(src))
  return _sam2_alone(sizes, sam2_rules.HF, source)


def _sam2_alone(config: Sam2Config, table: RuleTable, source: TensorSource) -> Conversion:
  shapes, axes = conversion.expected_sam2(config)
  checksums = Checksums()
  params, ignored = conversion.convert_tensors(table, source, shapes, checksums)
  return Conversion(config, params, axes, checksums, ignored=ignored)


def training_checkpoint(source: TensorSource, options: Options) -> Conversion:
  """The reference's .pth: what was trained, on top of the model directory `options.base`."""
  if not options.base:
    raise ValueError("a training checkpoint holds what was trained: --base takes the start model")
  folder = model_directory.resolve(options.base)
  base = model_directory.read_json(folder / "config.json", ModelConfig)
  if base.lora.rank:
    raise ValueError(f"{folder} has adapters of its own: --base takes a model without")
  names, frozen = export_names(list(source.shapes))
  adapters = {new: old for new, old in names.items() if is_adapter(new)}
  plain = Renamed(source, {new: old for new, old in names.items() if new not in adapters})
  checksums = Checksums()
  shapes, axes = conversion.expected_sa2va(base)
  stored = StoredParams(folder / "params").arrays
  tied = base.text.tie_embeddings
  params, ignored = conversion.convert_tensors(sa2va_table(tied), plain, shapes, checksums, stored)
  result = Conversion(base.sam2, params, axes, checksums, base, ignored=ignored)
  result.ignored |= dict.fromkeys(frozen, "the untrained copy of a trained embedding")
  result.image = model_directory.read_json(folder / "processor.json", ImageConfig)
  result.tokenizer = ChatTokenizer.from_dir(folder / "tokenizer")
  if adapters:
    _add_adapters(result, Renamed(source, adapters), options)
  return result


def _add_adapters(result: Conversion, source: TensorSource, options: Options) -> None:
  """Merges LoRA into the weights, or keeps it as adapters."""
  ranks = {source.shapes[k][0] for k in source.shapes if k.endswith("lora_A.weight")}
  if len(ranks) != 1:
    raise ValueError(f"adapters of several ranks: {sorted(ranks)}")
  rank = ranks.pop()
  alpha = 2.0 * rank if options.lora_alpha is None else options.lora_alpha
  assert result.model is not None
  with_lora = replace(result.model, lora=LoraConfig(rank, alpha))
  shapes, axes = conversion.expected_sa2va(with_lora)
  new = {name: shape for name, shape in shapes.items() if name.endswith((".lora_a", ".lora_b"))}
  params, _ = conversion.convert_tensors(ADAPTERS, source, new, result.checksums)
  result.params |= params
  result.notes.append(f"LoRA of rank {rank} and alpha {alpha:g}, {options.lora}d")
  if options.lora == "merge":
    result.params = merge_adapters(result.params, alpha / rank)
  else:
    result.model, result.axes = with_lora, axes


def fit_image(image: ImageConfig, model: ModelConfig) -> ImageConfig:
  """Preprocessing with the model's patch and picture sizes."""
  return replace(
    image,
    patch_size=model.vision.patch_size,
    temporal_patch_size=model.vision.temporal_patch_size,
    merge_size=model.vision.spatial_merge_size,
    grounding_size_px=model.sam2.image_size_px,
  )


def compute_dtype(source: TensorSource) -> ComputeDtype:
  """bfloat16 for a checkpoint that holds such tensors, as the reference runs it; else float32."""
  return "bfloat16" if "bfloat16" in source.dtypes.values() else "float32"


def check_vocabulary(tokenizer: ChatTokenizer, vocab_size: int) -> None:
  """Raises ValueError where the tokenizer has ids that the embedding has no row for."""
  if tokenizer.vocab_size > vocab_size:
    raise_all([f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {vocab_size} rows"])
