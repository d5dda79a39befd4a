"""python -m converters.from_hf: somebody else's checkpoint -> model directory.

python -m converters.from_hf --src HarborYuan/R-Sa2VA-Qwen3VL-4B-SFT --dst models/r_sa2va_4b
python -m converters.from_hf --src Qwen3-VL-4B-Instruct --sam2 sam2.1_hiera_large.pt --dst base_4b
python -m converters.from_hf --src iter_1251.pth --base models/sa2va_4b --dst models/mine

Reads R-Sa2VA and Sa2VA-Qwen3-VL exports, plain Qwen3-VL-*-Instruct, SAM 2 (Meta's .pt files and
transformers' folders; they become a directory of SAM 2 alone) and the reference's training
checkpoints. Tensors go one by one from the source into Orbax; a conversion that fails or is
interrupted leaves nothing behind.
"""

import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrt_jax import cli
from vrt_jax.config import ComputeDtype, MeshConfig

if TYPE_CHECKING:  # --help is quick
  from converters.conversion import Conversion

CARRIED_SUFFIXES = (".json", ".jinja", ".py", ".txt")
NOT_CARRIED = ("tokenizer.json", "tokenizer_config.json", "checksums.json")


@dataclass(frozen=True)
class Args:
  """Converts a checkpoint into a model directory."""

  src: str
  """Folder, .pt/.pth file, or the id of a repository on the Hugging Face hub."""
  dst: Path
  """Model directory to write; it must not exist."""
  dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
  """Of all parameters; keep: as each is stored in the checkpoint."""
  revision: str = ""
  """Commit, tag or branch of a hub repository."""
  sam2: str = ""
  """SAM 2 checkpoint for a plain Qwen3-VL; fresh weights where left out."""
  base: str = ""
  """Model directory that a training checkpoint (.pth) goes on top of."""
  lora: Literal["merge", "keep"] = "merge"
  """What becomes of a training checkpoint's adapters."""
  lora_alpha: float | None = None
  """Their alpha, which the file does not hold; twice the rank where left out, as in the recipe."""
  seg_hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
  """Which state prompts SAM 2; post_norm for models trained with transformers 5."""
  mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
  """Mesh that will load the model: chunks on disk follow its shards (fsdp and tensor)."""
  seed: int = 0
  """Of fresh weights."""


def convert(args: Args) -> dict:
  """Converts and writes; returns the report.

  Raises:
    ValueError: one message with everything that is wrong with the checkpoint.
    OSError: the disk is full.
  """
  from converters import atomic, hub, layouts, report
  from converters.params_writer import write_params

  started = time.perf_counter()
  src = hub.local_path(args.src, args.revision)
  options = layouts.Options(
    sam2=hub.local_path(args.sam2, "") if args.sam2 else None,
    base=args.base,
    lora=args.lora,
    lora_alpha=args.lora_alpha,
    seg_hidden=args.seg_hidden,
    seed=args.seed,
  )
  result = layouts.read_checkpoint(src, options)
  if args.dtype != "keep":
    result.params = {name: array.astype(args.dtype) for name, array in result.params.items()}
    if result.model is not None:
      compute: ComputeDtype = "bfloat16" if args.dtype == "bfloat16" else "float32"
      result.model = replace(result.model, compute_dtype=compute)
  result.params = _in_shards(result, args.mesh)
  num_bytes = sum(array.nbytes for array in result.params.values())
  with atomic.new_folder(args.dst, num_bytes) as folder:
    write_params(folder / "params", result.params)
    _verify(src, result.checksums.hex())
    content = report.conversion_report(result, args.src, time.perf_counter() - started)
    report.write_json(folder / report.REPORT_FILE, content)
    report.write_json(folder / report.CHECKSUM_FILE, result.checksums.hex())
    _write_rest(folder, src, result)
  return content


def _in_shards(result: "Conversion", mesh: MeshConfig) -> dict:
  """The parameters in chunks that follow the shards of a mesh."""
  from converters.params_writer import sharded
  from vrt_jax.runtime import mesh_axes

  sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
  if min(sizes.values()) < 1:
    raise ValueError(f"--mesh: sizes must be positive here, not {sizes}")
  if max(sizes.values()) == 1:
    return result.params
  out = {}
  for name, array in result.params.items():
    axes = mesh_axes(result.axes[name], array.shape, sizes)
    out[name] = sharded(array, tuple(1 if a is None else sizes[a] for a in axes))
  return out


def _verify(src: Path, checksums: dict[str, str]) -> None:
  """Compares with the checksum file that `to_hf` wrote, where the source has one."""
  import json

  from converters.report import CHECKSUM_FILE
  from converters.rules import raise_all

  file = src / CHECKSUM_FILE
  if not src.is_dir() or not file.is_file():
    return
  wanted = json.loads(file.read_text())
  wrong = sorted(k for k in checksums if k in wanted and checksums[k] != wanted[k])
  raise_all(f"{key}: other values than {CHECKSUM_FILE} says" for key in wrong)


def _write_rest(folder: Path, src: Path, result: "Conversion") -> None:
  """Everything beside the parameters; config.json, without which nothing loads, comes last."""
  from converters.report import write_json
  from converters.safetensors_writer import write_file
  from converters.streams import Checksums
  from vrt_jax import model_directory

  carried = folder / model_directory.CARRIED
  carried.mkdir()
  if src.is_dir():
    for file in sorted(src.iterdir()):
      is_index = file.name.endswith(".index.json")
      if file.suffix in CARRIED_SUFFIXES and file.name not in NOT_CARRIED and not is_index:
        shutil.copyfile(file, carried / file.name)
  if result.carried:
    write_file(carried / "tensors.safetensors", result.carried, Checksums())
  write_json(carried / "ties.json", result.ties)
  if result.model is None:
    model_directory.write_json(folder / model_directory.SAM2_CONFIG, result.sam2)
    return
  assert result.tokenizer is not None  # every whole model has one
  result.tokenizer.save(folder / "tokenizer")
  model_directory.write_json(folder / "processor.json", result.image)
  model_directory.write_json(folder / "config.json", result.model)


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m converters.from_hf", __doc__)
  content = convert(args)
  from converters.report import print_report

  print_report(content)
  print(f"written to {args.dst}")


def command() -> None:
  """The installed command: `main` with errors as one line."""
  cli.run(main)


if __name__ == "__main__":
  command()
