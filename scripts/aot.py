"""python -m scripts.aot: compiles a recipe's programs for a TPU pod on a machine without one.

python -m scripts.aot --config configs/vrt_sa2va_4b_qwen3_sft.py --topology v5e:4x4
python -m scripts.aot --config configs/vrt_sa2va_4b_qwen3_sft.py --topology v5p:4x4x8
  --program prefill --batch-per-chip 4

Prints JSON: HBM a chip by part and whether it fits, model FLOPs, collectives, compile seconds, and
a roofline ESTIMATE of step time and MFU from the chip's published peaks; nothing runs. Needs the
extra [aot] (libtpu). Recipe fields follow "--": `-- --optim.remat linears --mesh.tensor 4`.
"""

import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrt_jax import cli
from vrt_jax.config import TrainConfig

if TYPE_CHECKING:  # JAX is loaded after --help
  from jax.sharding import Mesh

  from scripts.model_flops import StepFlops


@dataclass(frozen=True)
class Args:
  """Compiles a program for TPUs that need not be there."""

  config: Path
  """Recipe file."""
  topology: str
  """Chip and shape: v5e:4x4, v6e:2x4, v5p:4x4x8, .."""
  program: Literal["sft", "prefill", "decode", "rollout", "grpo"] = "sft"
  batch_per_chip: int = 0
  """Samples a chip, for rollout and grpo prompts a chip; 0 for the recipe's batch over the chips
  (eval.batch_size for prefill and decode)."""
  tokens: int = 0
  """Sequence length; 0 for the first bucket of the recipe."""
  hlo: Path | None = None
  """Also write the compiled program's text here."""


def compile_program(args: Args, config: TrainConfig) -> dict:
  """Compiles and measures; returns the report.

  Raises:
    ValueError: the topology, the mesh or the batch do not fit.
  """
  from scripts import aot_programs, aot_report
  from scripts.chips import chip_of
  from scripts.hlo import Program
  from vrt_jax.train.update import remat_of

  chip = chip_of(args.topology)
  mesh = aot_programs.topology_mesh(args.topology, config.mesh)
  evaluates = args.program in ("prefill", "decode")
  batch = args.batch_per_chip * mesh.size or (
    config.eval.batch_size if evaluates else config.optim.batch_size
  )
  mesh, bucket = fitted(args.program, config, mesh, batch, args.tokens)

  started = time.perf_counter()
  lowered = aot_programs.PROGRAMS[args.program](config, mesh, batch, bucket)
  compiled, text = aot_report.compile_to_text(lowered.lowered)
  seconds = time.perf_counter() - started
  if args.hlo:
    args.hlo.write_text(text)
  program = Program(text)
  flops = program_flops(args.program, config, bucket)
  text_pairs = _text_pairs(args.program, config, bucket[0])
  moved = aot_report.collectives(program)
  found = aot_report.costs(program, chip, text_pairs)
  per_chip = flops.total * batch / mesh.size
  return {
    "program": args.program,
    "topology": args.topology,
    "mesh": dict(mesh.shape),
    "batch": batch,
    "batch_per_chip": batch / mesh.size,
    "accumulation_steps": config.optim.accumulation_steps,
    "bucket": {"tokens": bucket[0], "patches": bucket[1]},
    "remat": remat_of(config.optim, bucket[0] + math.prod(_completions(args.program, config))),
    "trainable": config.optim.trainable,
    "memory": aot_report.memory(compiled, lowered.parts, program, chip),
    "score_matrix_elements": aot_report.score_matrix_elements(
      program, set(bucket) - {config.model.text.hidden_size}
    ),
    "model_tflops_a_sample": {k: round(v / 1e12, 3) for k, v in flops.parts.items()},
    "collectives": moved,
    "estimate": aot_report.roofline(found, chip, per_chip, moved),
    "compiler_seconds": round(aot_report.compiler_seconds(program, chip), 3),
    "costliest": aot_report.costliest(found),
    "compile_seconds": round(seconds, 1),
    "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
  }


def fitted(
  program: str, config: TrainConfig, mesh: "Mesh", batch: int, tokens: int
) -> tuple["Mesh", tuple[int, int]]:
  """(the mesh that a program runs on, its bucket); 0 `tokens` are those of the recipe.

  Raises:
    ValueError: the mesh does not divide the batch.
  """
  from vrt_jax.runtime import batch_parts, with_tensor

  if program == "rollout":
    mesh = with_tensor(mesh, config.grpo.rollout_tensor)
  rows = batch_parts(mesh)
  if batch % rows:
    raise ValueError(f"a batch of {batch} does not divide over data x fsdp = {rows}")
  first, patches = first_bucket(program, config)
  return mesh, (tokens or first, patches)


def first_bucket(program: str, config: TrainConfig) -> tuple[int, int]:
  """(tokens, patches) of the recipe's smallest inputs of a program."""
  prompts = config.eval.prompt_buckets
  buckets = {"sft": config.data.buckets, "prefill": prompts, "decode": prompts}
  return buckets.get(program, config.grpo.prompt_buckets)[0]


def program_flops(program: str, config: TrainConfig, bucket: tuple[int, int]) -> "StepFlops":
  """Model FLOPs of a program for one sample, for rollout and grpo one prompt."""
  from scripts import model_flops

  trainable, model, grpo = config.optim.trainable, config.model, config.grpo
  if program == "sft":
    return model_flops.sft_flops(model, *bucket, config.data.num_objects, trainable == "all")
  if program == "prefill":
    return model_flops.prefill_flops(model, *bucket)
  if program == "decode":
    return model_flops.decode_flops(model, bucket[0], config.eval.max_new_tokens)
  if program == "rollout":
    return model_flops.rollout_flops(model, grpo, *bucket)
  return model_flops.grpo_flops(model, grpo, bucket[0], trainable == "adapters")


def _completions(program: str, config: TrainConfig) -> tuple[int, int]:
  """How many follow a prompt in a packed sequence, and their length."""
  return (config.grpo.group_size, config.grpo.max_new_tokens) if program == "grpo" else (0, 0)


def _text_pairs(program: str, config: TrainConfig, tokens: int) -> float:
  from scripts import model_flops

  completions = _completions(program, config)
  return model_flops.group_pairs(tokens, *completions) / (tokens + math.prod(completions)) ** 2


def main() -> None:
  """Command line."""
  own, fields = cli.split_at_dashes(sys.argv[1:])
  args = cli.parse(Args, own, "python -m scripts.aot", __doc__)
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  from vrt_jax.train.__main__ import load_recipe

  recipe = load_recipe(args.config)
  config = cli.parse(TrainConfig, fields, "python -m scripts.aot ..", default=recipe)
  import libtpu  # noqa: F401 (where it is missing, cli.run says how to get it)

  print(json.dumps(compile_program(args, config), indent=2))


if __name__ == "__main__":
  cli.run(main)
