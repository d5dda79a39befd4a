"""python -m scripts.aot_table: the table of docs/pods.md, from one compilation a row.

python -m scripts.aot_table --out aot
python -m scripts.aot_table --out aot --rows v5e44_sft v5e44_prefill

Every row is a run of scripts.aot in a process of its own, kept as OUT/NAME.json; rows that are
there already are not compiled again. About five minutes a training step on two cores.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vrt_jax import cli
from vrt_jax.files import write_whole

SFT = "--config configs/vrt_sa2va_4b_qwen3_sft.py"
GRPO = "--config configs/vrt_qwen3_4b_grpo.py"
PREFILL = f"{SFT} --program prefill --batch-per-chip 1"
DECODE = f"{SFT} --program decode"
FULL = "--model.lora.rank 0 --optim.trainable all"
DIVIDED = "--mesh.data 4 --mesh.fsdp 64"
"""256 divides none of SAM 2's widths, 64 divides most."""
TENSOR = "--mesh.fsdp 64 --mesh.tensor 4"
"""The recipe's 64 samples on 256 chips: four chips share one."""
PARTS = "--optim.accumulation-steps 4 --optim.remat linears --optim.full-remat-tokens 8192"
"""The recipe's 64 samples on 16 chips, a sample a chip at a time."""
PARTS_OF_8 = "--optim.accumulation-steps 8 --optim.remat linears"
"""The same on 8 chips."""
TENSOR_4 = "--mesh.fsdp 4 --mesh.tensor 4"
"""Four chips share samples, and each reads a quarter of the weights a token."""
SHARED = "--grpo.rollout-tensor 4"
"""Four chips divide the weights of a rollout."""
TOKENS = 2560
"""Of the recipe's first bucket; most samples are no longer."""
ROWS: dict[str, str] = {
  "v5e44_sft_1": f"{SFT} --topology v5e:4x4 --batch-per-chip 1",
  "v5e44_full_1": f"{SFT} --topology v5e:4x4 --batch-per-chip 1 -- {FULL}",
  "v5e44_sft": f"{SFT} --topology v5e:4x4",
  "v5e44_sft_parts": f"{SFT} --topology v5e:4x4 -- {PARTS}",
  "v5e44_sft_4096": f"{SFT} --topology v5e:4x4 --tokens 4096 -- {PARTS}",
  "v5e44_sft_8192": f"{SFT} --topology v5e:4x4 --tokens 8192 -- {PARTS}",
  "v5e88_sft": f"{SFT} --topology v5e:8x8",
  "v5e1616_sft": f"{SFT} --topology v5e:16x16 --batch-per-chip 1",
  "v5e1616_sft_64": f"{SFT} --topology v5e:16x16 --batch-per-chip 1 -- {DIVIDED}",
  "v5e1616_sft_t4": f"{SFT} --topology v5e:16x16 -- {TENSOR}",
  "v6e24_sft": f"{SFT} --topology v6e:2x4",
  "v6e24_sft_1": f"{SFT} --topology v6e:2x4 --batch-per-chip 1",
  "v6e24_sft_2": f"{SFT} --topology v6e:2x4 --batch-per-chip 2",
  "v6e24_sft_parts": f"{SFT} --topology v6e:2x4 -- {PARTS_OF_8}",
  "v6e44_sft_1": f"{SFT} --topology v6e:4x4 --batch-per-chip 1",
  "v5p448_sft_b4": f"{SFT} --topology v5p:4x4x8 --batch-per-chip 4 -- --optim.remat linears",
  "v5e44_prefill": f"{PREFILL} --topology v5e:4x4",
  "v5e88_prefill": f"{PREFILL} --topology v5e:8x8",
  "v5e1616_prefill": f"{PREFILL} --topology v5e:16x16",
  "v5e1616_prefill_64": f"{PREFILL} --topology v5e:16x16 -- {DIVIDED}",
  "v6e24_prefill": f"{PREFILL} --topology v6e:2x4",
  "v6e44_prefill": f"{PREFILL} --topology v6e:4x4",
  "v5p448_prefill": f"{PREFILL} --topology v5p:4x4x8",
  "v5e44_decode_1": f"{DECODE} --topology v5e:4x4 --batch-per-chip 1",
  "v5e44_decode_4": f"{DECODE} --topology v5e:4x4 --batch-per-chip 4",
  "v5e44_decode_t4": f"{DECODE} --topology v5e:4x4 --batch-per-chip 4 -- {TENSOR_4}",
  "v6e24_decode_4": f"{DECODE} --topology v6e:2x4 --batch-per-chip 4",
  "v5p448_decode_8": f"{DECODE} --topology v5p:4x4x8 --batch-per-chip 8",
  "v5e44_rollout": f"{GRPO} --topology v5e:4x4 --program rollout",
  "v5e44_grpo": f"{GRPO} --topology v5e:4x4 --program grpo",
  "v5e44_rollout_4": f"{GRPO} --topology v5e:4x4 --program rollout -- {SHARED}",
  "v6e44_rollout_4": f"{GRPO} --topology v6e:4x4 --program rollout -- {SHARED}",
  "v6e44_grpo": f"{GRPO} --topology v6e:4x4 --program grpo",
  "v5p224_rollout_4": f"{GRPO} --topology v5p:2x2x4 --program rollout -- {SHARED}",
  "v5p224_grpo": f"{GRPO} --topology v5p:2x2x4 --program grpo",
}
"""Name -> arguments of scripts.aot."""
HEAD = (
  "| topology | program | samples or prompts a chip | remat | GiB a chip | fits | "
  "seconds (overlapped / serial) | MFU | network GB | compilation s | host GiB |\n"
  "|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Args:
  """Compiles the rows and prints the table."""

  out: Path
  """Folder of the rows' reports."""
  rows: tuple[str, ...] = ()
  """Only these; all where left out."""


def compile_row(name: str, file: Path) -> None:
  """Runs scripts.aot; raises ValueError with its last line where it fails."""
  command = [sys.executable, "-m", "scripts.aot", *ROWS[name].split()]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise ValueError(f"{name}: {lines[-1]}")
  write_whole(file, done.stdout)


def row(report: dict) -> str:
  """A line of the table."""
  memory, estimate = report["memory"], report["estimate"]
  seconds, mfu = estimate["estimated_seconds"], estimate["estimated_mfu"]
  sent = sum(kind["gigabytes"] for kind in report["collectives"].values())
  names = {"sft": "full SFT" if report["trainable"] == "all" else "SFT", "grpo": "GRPO update"}
  trains = report["program"] in names
  program = names.get(report["program"], report["program"])
  if report["program"] == "sft" and (tokens := report["bucket"]["tokens"]) != TOKENS:
    program += f", {tokens} tokens"
  parts = report["accumulation_steps"] if trains else 1
  samples = f"{report['batch_per_chip'] / parts:g}"
  mesh = [f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1]
  cells = [
    ", ".join([report["topology"], " x ".join(mesh)] if len(mesh) > 1 else [report["topology"]]),
    program,
    samples if parts == 1 else f"{parts} x {samples}",
    report["remat"] if trains else "-",
    f"{memory['peak_gib']:.2f}",
    "yes" if memory["fits"] else "NO",
    f"{seconds['overlapped']:.2f} / {seconds['serial']:.2f}",
    f"{100 * mfu['overlapped']:.0f} % / {100 * mfu['serial']:.0f} %",
    f"{sent:.1f}",
    f"{report['compile_seconds']:.0f}",
    f"{report['host_gib']:.1f}",
  ]
  return "| " + " | ".join(cells) + " |"


def table(folder: Path) -> str:
  """The rows that are there, in the order of `ROWS`."""
  files = [folder / f"{name}.json" for name in ROWS]
  return "\n".join([HEAD, *(row(json.loads(f.read_text())) for f in files if f.is_file())])


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.aot_table", __doc__)
  unknown = sorted(set(args.rows) - set(ROWS))
  if unknown:
    raise ValueError(f"--rows {unknown[0]}: none of {', '.join(ROWS)}")
  args.out.mkdir(parents=True, exist_ok=True)
  missing = [n for n in args.rows or ROWS if not (args.out / f"{n}.json").is_file()]
  for name in tqdm(missing, desc="compile", unit="program"):
    compile_row(name, args.out / f"{name}.json")
  print(table(args.out))


if __name__ == "__main__":
  cli.run(main)
