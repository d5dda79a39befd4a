"""Tiny checkpoints in other people's layouts, every value random."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from converters.conversion import expected_sa2va
from converters.export import patch_kernel, rename
from converters.hf_config import OWN_SECTION, hf_config, own_section
from converters.sa2va_rules import SAM2_PREFIX, sa2va_table
from converters.side_files import sa2va_section
from converters.streams import whole
from converters.tensor_files import INDEX, SINGLE
from tests import tiny
from vrt_jax.config import ModelConfig

MEMORY_KEYS = {"memory_attention.norm.weight": (8,), "maskmem_tpos_enc": (7, 1, 1, 4)}


def random_tensors(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict:
  """Every tensor of an export of `config`, video memory included."""
  rng = np.random.default_rng(seed)
  shapes = expected_sa2va(config)[0]
  arrays = {n: whole(np.zeros(shape, np.float32)) for n, shape in shapes.items()}
  names = rename(sa2va_table(config.text.tie_embeddings), arrays, patch_kernel(config))
  wanted = {key: array.shape for key, array in names.items()}
  wanted |= {SAM2_PREFIX + key: shape for key, shape in MEMORY_KEYS.items()}
  tensors = {}
  for key, shape in sorted(wanted.items()):
    noise = rng.normal(size=shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
    noise = 1 + noise if "norm" in key and key.endswith("weight") else noise
    tensors[key] = torch.from_numpy(noise).to(dtype)
  return tensors


def write_config(folder: Path, config: ModelConfig, **changes: object) -> None:
  """config.json and the tokenizer of an export."""
  folder.mkdir(parents=True, exist_ok=True)
  content = hf_config(config, tiny.tokenizer(), "float32", {}) | sa2va_section({}, "hub/repo")
  content |= {OWN_SECTION: own_section(config, tiny.IMAGE), "template": "qwen_chat"} | changes
  (folder / "config.json").write_text(json.dumps(content))
  tiny.tokenizer().save(folder)


def write_sharded(folder: Path, tensors: dict, num_shards: int) -> None:
  """safetensors files, with an index where there are several."""
  if num_shards == 1:
    save_file(tensors, folder / SINGLE)
    return
  index = {}
  for i in range(num_shards):
    name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
    part = {key: tensors[key] for key in list(tensors)[i::num_shards]}
    save_file(part, folder / name)
    index |= dict.fromkeys(part, name)
  (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def write_export(
  folder: Path,
  config: ModelConfig = tiny.MODEL,
  dtype: torch.dtype = torch.float32,
  num_shards: int = 2,
) -> dict:
  """A whole export; gives its tensors."""
  write_config(folder, config)
  tensors = random_tensors(config, dtype)
  write_sharded(folder, tensors, num_shards)
  return tensors
