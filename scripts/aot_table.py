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

RECIPE = "configs/vrt_sa2va_4b_qwen3_sft.py"
FULL = "--model.lora.rank 0 --optim.trainable all"
ROWS: dict[str, str] = {
  "v5e44_sft_1": "--topology v5e:4x4 --batch-per-chip 1",
  "v5e44_full_1": f"--topology v5e:4x4 --batch-per-chip 1 -- {FULL}",
  "v5e44_sft": "--topology v5e:4x4",
  "v5e44_prefill": "--topology v5e:4x4 --program prefill --batch-per-chip 1",
  "v5e88_sft": "--topology v5e:8x8",
  "v5e88_prefill": "--topology v5e:8x8 --program prefill --batch-per-chip 1",
  "v5e1616_sft": "--topology v5e:16x16 --batch-per-chip 1",
  "v5e1616_prefill": "--topology v5e:16x16 --program prefill --batch-per-chip 1",
  "v6e24_sft": "--topology v6e:2x4",
  "v6e24_prefill": "--topology v6e:2x4 --program prefill --batch-per-chip 1",
  "v6e44_sft": "--topology v6e:4x4",
  "v6e44_prefill": "--topology v6e:4x4 --program prefill --batch-per-chip 1",
  "v5p448_sft_b4": "--topology v5p:4x4x8 --batch-per-chip 4 -- --optim.remat linears",
  "v5p448_prefill": "--topology v5p:4x4x8 --program prefill --batch-per-chip 1",
}
"""Name -> arguments of scripts.aot."""
HEAD = (
  "| topology | program | samples a chip | remat | GiB a chip | fits | MFU (overlapped / serial) | "
  "network GB a step | compilation s | host GiB |\n"
  "|---|---|---|---|---|---|---|---|---|---|"
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
  command = [sys.executable, "-m", "scripts.aot", "--config", RECIPE, *ROWS[name].split()]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise ValueError(f"{name}: {lines[-1]}")
  partial = file.with_suffix(".partial")
  partial.write_text(done.stdout)
  partial.replace(file)


def row(report: dict) -> str:
  """A line of the table."""
  memory, estimate = report["memory"], report["estimate"]
  mfu = estimate["estimated_mfu"]
  sent = sum(kind["gigabytes"] for kind in report["collectives"].values())
  program = "full SFT" if report["trainable"] == "all" else "SFT"
  cells = [
    report["topology"],
    program if report["program"] == "sft" else report["program"],
    f"{report['batch_per_chip']:g}",
    report["remat"] if report["program"] == "sft" else "-",
    f"{memory['peak_gib']:.2f}",
    "yes" if memory["fits"] else "NO",
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
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.aot_table")
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
