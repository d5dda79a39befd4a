"""python -m scripts.time_program: how long a recipe's programs take on the devices at hand.

python -m scripts.time_program --config configs/vrt_sa2va_4b_qwen3_sft.py --batch 4
python -m scripts.time_program --config configs/vrt_sa2va_4b_qwen3_sft.py --program decode
  -- --eval.max-new-tokens 128

The programs of `scripts.aot`, run with random weights and full batches; no data or weights are
needed. Prints JSON: median and all seconds, of compiling too, model FLOPs a second and their share
of the published peak, and the peak of memory. `--trace DIR` writes a trace of a run for xprof.
Recipe fields follow "--".
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vrt_jax import cli
from vrt_jax.config import TrainConfig


@dataclass(frozen=True)
class Args:
  """Runs a program of a recipe with random weights."""

  config: Path
  """Recipe file."""
  program: Literal["sft", "prefill", "decode", "rollout", "grpo"] = "sft"
  batch: int = 0
  """Samples of all devices, for rollout and grpo prompts; 0 for one a device."""
  tokens: int = 0
  """Sequence length; 0 for the first bucket of the recipe."""
  labelled: int = 500
  """Tokens of a sample that the SFT step predicts."""
  repeats: int = 5
  trace: Path | None = None
  """Also write a trace here."""


def time_program(args: Args, config: TrainConfig) -> dict:
  """Compiles, runs and measures; returns the report.

  Raises:
    ValueError: the mesh does not fit the devices, or does not divide the batch.
  """
  import jax

  from scripts import aot_programs
  from scripts.aot import fitted, program_flops
  from scripts.chips import peak_of
  from scripts.filled import filled
  from vrt_jax.runtime import make_mesh

  mesh = make_mesh(config.mesh)
  batch = args.batch or mesh.size
  mesh, bucket = fitted(args.program, config, mesh, batch, args.tokens)
  started = time.perf_counter()
  lowered = aot_programs.PROGRAMS[args.program](config, mesh, batch, bucket)
  compiled = lowered.lowered.compile()
  compile_seconds = time.perf_counter() - started
  arrays = filled(
    lowered.args,
    visual_tokens=bucket[1] // config.model.vision.spatial_merge_size**2,
    labelled=args.labelled,
    new_tokens=config.grpo.max_new_tokens,
  )
  donated = jax.tree.map(lambda info: info.donated, compiled.args_info[0])

  def run() -> float:
    given = jax.tree.map(lambda x, lost: x.copy() if lost else x, arrays, donated)
    jax.block_until_ready(given)
    started = time.perf_counter()
    jax.block_until_ready(compiled(*given))
    return time.perf_counter() - started

  run()
  seconds = [run() for _ in range(args.repeats)]
  if args.trace:
    with jax.profiler.trace(str(args.trace)):
      run()
  median, device = statistics.median(seconds), mesh.devices.flat[0]
  flops = program_flops(args.program, config, bucket).total * batch / mesh.size / median
  peak, memory = peak_of(device.device_kind), device.memory_stats()
  steps = config.eval.max_new_tokens - 1
  return {
    "program": args.program,
    "device": device.device_kind,
    "mesh": dict(mesh.shape),
    "batch": batch,
    "bucket": {"tokens": bucket[0], "patches": bucket[1]},
    "seconds": round(median, 4),
    "all_seconds": [round(s, 4) for s in seconds],
    "compile_seconds": round(compile_seconds, 1),
    "model_tflops_a_second": round(flops / 1e12, 2),
    "mfu": peak and round(flops / peak, 3),
    "peak_gib": memory and round(memory["peak_bytes_in_use"] / 2**30, 2),
  } | ({"ms_a_token": round(1e3 * median / steps, 3)} if args.program == "decode" else {})


def main() -> None:
  """Command line."""
  own, fields = cli.split_at_dashes(sys.argv[1:])
  args = cli.parse(Args, own, "python -m scripts.time_program", __doc__)
  from vrt_jax.runtime import say, start_processes
  from vrt_jax.train.__main__ import load_recipe

  recipe = load_recipe(args.config)
  config = cli.parse(TrainConfig, fields, "python -m scripts.time_program ..", default=recipe)
  start_processes()
  say(json.dumps(time_program(args, config)))


if __name__ == "__main__":
  cli.run(main)
