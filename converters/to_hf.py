"""python -m converters.to_hf: model directory -> Hugging Face folder.

python -m converters.to_hf --src runs/mine/model --dst export --dtype bfloat16
python -m converters.to_hf --src runs/mine --dst adapter --adapter
python -m converters.to_hf --src runs/mine/model --dst export --layout qwen3_vl

`sa2va` is the reference's export: safetensors shards, config.json, tokenizer, chat template and
processor files, for its remote code. `qwen3_vl` is the language model alone for transformers'
Qwen3VLForConditionalGeneration, `sam2` the segmentation model for Sam2Model. Tensors that have not
been trained come out bit for bit as they went into `from_hf`. An export that fails or is
interrupted leaves nothing behind.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrt_jax import cli

if TYPE_CHECKING:
  from converters.export import Source

REMOTE_CODE = "HarborYuan/R-Sa2VA-Qwen3VL-4B-SFT"
"""Hub repository with the reference's modelling files, for models not converted from an export."""


@dataclass(frozen=True)
class Args:
  """Converts a model directory into a Hugging Face folder."""

  src: str
  """Model directory or training workdir (its newest checkpoint)."""
  dst: Path
  """Folder to write; it must not exist."""
  layout: Literal["sa2va", "qwen3_vl", "sam2"] = "sa2va"
  adapter: bool = False
  """Write only the adapters, as a PEFT folder."""
  dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
  """keep: as stored."""
  max_shard_gb: float = 5.0
  """Largest file, in 10^9 bytes."""


def convert(args: Args) -> dict:
  """Converts and writes; returns part of the checkpoint -> tensors, values, bytes.

  Raises:
    ValueError: `src` is no model, or has no adapters where they are asked for.
    OSError: the disk is full.
  """
  from converters import atomic, export, report
  from converters.safetensors_writer import write_file, write_shards
  from converters.streams import Checksums

  source = export.open_source(args.src)
  tensors = {
    "sa2va": export.sa2va_tensors,
    "qwen3_vl": export.qwen_tensors,
    "sam2": export.sam2_tensors,
  }
  if args.adapter:
    arrays = export.adapter_tensors(source)
  else:
    arrays = tensors[args.layout](source)
  if args.dtype != "keep":
    arrays = {key: array.astype(args.dtype) for key, array in arrays.items()}
  checksums = Checksums()
  with atomic.new_folder(args.dst, sum(array.nbytes for array in arrays.values())) as folder:
    if args.adapter:
      write_file(folder / "adapter_model.safetensors", arrays, checksums)
      report.write_json(folder / "adapter_config.json", adapter_config(source))
    else:
      write_shards(folder, arrays, int(args.max_shard_gb * 1e9), checksums)
      dtype = max((a.nbytes, a.dtype.name) for a in arrays.values())[1]
      write_side_files(folder, source, args.layout, dtype)
    report.write_json(folder / report.CHECKSUM_FILE, checksums.hex())
  return report.totals(arrays)


def adapter_config(source: "Source") -> dict:
  """PEFT's adapter_config.json."""
  lora = source.model.lora
  names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": lora.dropout,
    "bias": "none",
    "target_modules": rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(names)})",
    "base_model_name_or_path": None,
    "inference_mode": True,
  }


def write_side_files(folder: Path, source: "Source", layout: str, dtype: str) -> None:
  """config.json and, for models with a language half, tokenizer, chat template and processor."""
  from converters import hf_config, sam2_config, side_files
  from converters.report import write_json

  if layout == "sam2":
    write_json(folder / "config.json", sam2_config.sam2_hf_config(source.model.sam2, dtype))
    write_json(folder / "preprocessor_config.json", side_files.sam2_processor(source.model.sam2))
    return
  original = side_files.original_config(source.carried) if layout == "sa2va" else {}
  if source.carried and layout == "sa2va":
    for file in sorted(source.carried.iterdir()):
      if file.name not in side_files.OWN_FILES:
        shutil.copyfile(file, folder / file.name)
  config = hf_config.hf_config(source.model, source.tokenizer, dtype, original)
  if layout == "sa2va":
    config |= side_files.sa2va_section(original, REMOTE_CODE)
    config[hf_config.OWN_SECTION] = hf_config.own_section(source.model, source.image)
  else:
    config |= {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
  write_json(folder / "config.json", config)
  source.tokenizer.save(folder)
  for name, content in side_files.processor_files(source.image, source.tokenizer).items():
    if not (folder / name).exists():
      if isinstance(content, str):
        (folder / name).write_text(content, encoding="utf-8")
      else:
        write_json(folder / name, content)


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m converters.to_hf", __doc__)
  parts = convert(args)
  print(f"{'part':<40}{'tensors':>8}{'values':>16}{'MB':>10}")
  for part, entry in parts.items():
    print(f"{part:<40}{entry['tensors']:>8}{entry['values']:>16,}{entry['bytes'] / 1e6:>10,.1f}")
  print(f"written to {args.dst}")


if __name__ == "__main__":
  cli.run(main)
