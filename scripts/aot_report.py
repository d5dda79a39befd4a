"""What a compiled TPU program needs: memory by part, collectives, and a roofline estimate."""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from scripts.chips import GIB, Chip
from scripts.hlo import COLLECTIVES, Program
from scripts.hlo_text import Computation, Instruction
from scripts.vector_ops import vector_ops

UNKNOWN_CYCLES = 2**40
"""From here on a number stands for none."""
_ASYNC_COPIES = ("copy-start", "copy-done", "slice-start", "slice-done")


def compile_to_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """The compiled program and the text of its final form.

  The compiler writes the text itself: `as_text` reads the program back, which fails in libtpu
  0.0.52 where gathers are given to a v6e's sparse cores.

  Raises ValueError where the program needs more memory than the chip has.
  """
  with tempfile.TemporaryDirectory() as folder:
    options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).partition("\n")[0]
      if not reason.startswith("RESOURCE_EXHAUSTED"):
        raise
      raise ValueError(f"the program does not fit: {reason}") from error
    (file,) = Path(folder).glob("*.after_codegen.txt")
    return compiled, file.read_text()


def bytes_a_chip(tree: object) -> int:
  """Of the arrays of a tree, of each the part that one device holds."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
  )


def memory(
  compiled: jax.stages.Compiled, parts: Mapping[str, object], program: Program, chip: Chip
) -> dict:
  """HBM a chip in GiB: by part, at the peak, and whether it fits.

  Activations are what layers keep for the backward pass; temporaries are the rest of the peak.
  """
  analysis: Any = compiled.memory_analysis()
  held = {name: bytes_a_chip(tree) for name, tree in parts.items()}
  peak = analysis.peak_memory_in_bytes
  kept = kept_activations(program)
  code = analysis.generated_code_size_in_bytes
  rest = peak - sum(held.values()) - kept
  gib = {name: value / GIB for name, value in held.items()}
  gib |= {"activations": kept / GIB, "temporaries": rest / GIB, "program": code / GIB}
  total = peak + code
  return {
    "gib": {name: round(value, 3) for name, value in gib.items()},
    "peak_gib": round(total / GIB, 3),
    "fits": bool(total <= chip.hbm_bytes),
  }


def kept_activations(program: Program) -> int:
  """Bytes that loops fill layer by layer while gradients are to come."""
  total = 0
  for _, loop, _ in program.scheduled():
    if loop.opcode != "while" or not re.search(r"jvp\(\)/while\"", loop.text):
      continue
    if "transpose" in loop.text:
      continue
    body = program.computations[loop.given("body")]
    total += sum(
      body.instructions[name].types[0].nbytes
      for name in body.root.operands
      if program.origin(body, name)[1].opcode == "dynamic-update-slice"
    )
  return total


def collectives(program: Program) -> dict[str, dict[str, float]]:
  """Kind -> {count a step, gigabytes a chip sends}; a collective in several pieces counts once."""
  found: dict[str, tuple[str, float, float]] = {}

  def look(computation: Computation, times: float) -> None:
    for i in computation.instructions.values():
      kind = i.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        key = i.attribute("channel_id") or i.name
        before = found.get(key, (kind, 0.0, 0.0))
        found[key] = (kind, max(before[1], sent_bytes(i, kind)), max(before[2], times))
      elif i.opcode in ("fusion", "async-start"):
        for callee in i.callees:
          look(program.computations[callee], times)

  for name, times in program.runs.items():
    look(program.computations[name], times)
  totals: dict[str, dict[str, float]] = {}
  for kind, size, times in found.values():
    entry = totals.setdefault(kind, {"count": 0, "gigabytes": 0.0})
    entry["count"] += round(times)
    entry["gigabytes"] += size * times / 1e9
  return {k: {**v, "gigabytes": round(v["gigabytes"], 3)} for k, v in sorted(totals.items())}


def sent_bytes(instruction: Instruction, kind: str) -> float:
  """What one chip sends for a collective, by ring algorithms."""
  sizes = [t.nbytes for t in instruction.types]
  if instruction.opcode.endswith("-start"):  # (operands, results, ..)
    sizes = [max(sizes, default=0)]
  size, n = float(sum(sizes)), group_size(instruction.text)
  share = (n - 1) / n if n else 0.0
  if kind == "collective-permute":
    return size
  return size * share * {"all-reduce": 2.0, "reduce-scatter": n}.get(kind, 1.0)


def group_size(text: str) -> int:
  """Devices that take part together."""
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", match[2]))
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return len(match[1].split(","))
  return 1


def kernel_flops(instruction: Instruction, text_pairs: float) -> float:
  """Of an attention kernel; forward takes two products, backward, all in one kernel, five.

  `text_pairs`: of all pairs of two text tokens, the part that the text's mask lets through.
  """
  if 'custom_call_target="tpu_custom_call"' not in instruction.text:
    return 0.0
  found = re.search(r"operand_layout_constraints=\{(.*)", instruction.text)
  shapes = [
    tuple(int(n) for n in dims.split(","))
    for dims in re.findall(r"bf16\[([\d,]+)\]", found[1] if found else "")
  ]
  shapes = [s for s in shapes if len(s) >= 3]
  if len(shapes) < 2:
    return 0.0
  q, k = shapes[0], shapes[1]
  products = 5 if "dkv" in instruction.name else 2
  share = text_pairs if q[-3] != k[-3] else 1.0  # only the text decoder has grouped heads
  return share * products * 2.0 * math.prod(q) * k[-2]


@dataclass(frozen=True)
class Cost:
  """What an instruction takes in a step, all its runs together, by the chip's published peaks."""

  instruction: Instruction
  flops: float
  vector_ops: float
  hbm_bytes: float
  chip: Chip

  @property
  def bounds(self) -> dict[str, float]:
    """Seconds of memory, of matrix products and of elementwise operations."""
    return {
      "memory": self.hbm_bytes / self.chip.hbm_bytes_per_second,
      "arithmetic": self.flops / self.chip.peak_flops,
      "vector": self.vector_ops / self.chip.vector_ops_per_second,
    }

  @property
  def seconds(self) -> float:
    """The slowest of the three; 0 for copies and collectives, which run beside."""
    kind = self.instruction.opcode.removesuffix("-start").removesuffix("-done")
    if self.instruction.opcode in _ASYNC_COPIES or kind in COLLECTIVES:
      return 0.0
    return max(self.bounds.values())

  @property
  def source(self) -> str:
    """The line of the model that it comes from, without the loops around it."""
    found = re.search(r'op_name="([^"]*)"', self.instruction.text)
    parts = re.sub(r"^jit\([^)]*\)/", "", found[1] if found else self.instruction.name).split("/")
    return "/".join(p for p in parts if p not in ("while", "body", "closed_call", "checkpoint"))


def costs(program: Program, chip: Chip, text_pairs: float) -> list[Cost]:
  """Of all instructions that run. `text_pairs`: see `kernel_flops`."""
  return [
    Cost(
      instruction,
      times * (program.flops(computation, instruction) + kernel_flops(instruction, text_pairs)),
      times * vector_ops(program, computation, instruction),
      times * program.hbm_bytes(computation, instruction),
      chip,
    )
    for computation, instruction, times in program.scheduled()
  ]


def costliest(found: Sequence[Cost], count: int = 5) -> list[dict]:
  """The `count` lines of the model, by the shape they give, that take longest, and their bound."""
  by_source: dict[str, list[Cost]] = {}
  for cost in found:
    shapes = [f"{t.dtype}{list(t.shape)}" for t in cost.instruction.types[:1]]
    by_source.setdefault(" ".join([cost.source, *shapes]), []).append(cost)
  total = sum(cost.seconds for cost in found)
  lines = sorted(by_source.items(), key=lambda line: -sum(c.seconds for c in line[1]))
  result = []
  for source, group in lines[:count]:
    seconds = sum(c.seconds for c in group)
    bounds = {name: sum(c.bounds[name] for c in group) for name in group[0].bounds}
    moved = sum(c.hbm_bytes for c in group)
    result.append(
      {
        "operation": source,
        "seconds": round(seconds, 4),
        "share": round(seconds / total, 3) if total else 0.0,
        "bound": max(bounds, key=bounds.__getitem__),
        "flops_a_byte": round(sum(c.flops for c in group) / moved, 1) if moved else None,
      }
    )
  return result


def compiler_seconds(program: Program, chip: Chip) -> float:
  """What XLA's own cost model says of all operations, one after the other, but kernels.

  It is pessimistic about memory: an elementwise operation reads and writes at 0.4 of the published
  bandwidth. Between two programs it tells what the estimate here may not see.
  """
  total = 0.0
  for _, instruction, times in program.scheduled():
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
    cycles = int(found[1]) if found else 0
    total += times * cycles if cycles < UNKNOWN_CYCLES else 0.0
  return total / chip.clock


def roofline(
  found: Sequence[Cost],
  chip: Chip,
  model_flops: float,
  moved: Mapping[str, Mapping[str, float]],
) -> dict:
  """An estimate of the step from published peaks: each operation at its slowest bound.

  `overlapped`: collectives and copies run beside the operations; `serial`: after them.
  `flops_a_byte`: arithmetic intensity; above `ridge_flops_a_byte` arithmetic is the limit.
  """
  busy, flops, hbm = (
    sum(getattr(cost, name) for cost in found) for name in ("seconds", "flops", "hbm_bytes")
  )
  network = sum(v["gigabytes"] for v in moved.values()) * 1e9 / chip.ici_bytes_per_second
  alone = max(busy, hbm / chip.hbm_bytes_per_second)  # copies share the memory with operations
  overlapped, serial = max(alone, network), alone + network
  return {
    "model_tflops": round(model_flops / 1e12, 2),
    "executed_tflops": round(flops / 1e12, 2),
    "hbm_gigabytes": round(hbm / 1e9, 1),
    "flops_a_byte": round(flops / hbm, 1) if hbm else None,
    "ridge_flops_a_byte": round(chip.peak_flops / chip.hbm_bytes_per_second, 1),
    "operations_seconds": round(busy, 4),
    "network_seconds": round(network, 4),
    "estimated_seconds": {"overlapped": round(overlapped, 4), "serial": round(serial, 4)},
    "estimated_mfu": {
      "overlapped": round(model_flops / overlapped / chip.peak_flops, 3),
      "serial": round(model_flops / serial / chip.peak_flops, 3),
    },
  }


def score_matrix_elements(program: Program, lengths: set[int]) -> int:
  """Elements of the largest array in HBM that has one of `lengths` twice, as scores do; 0: none."""
  return max(
    (
      math.prod(t.shape)
      for _, instruction, _ in program.scheduled()
      for t in instruction.types
      if t.in_hbm and any(t.shape.count(n) >= 2 for n in lengths)
    ),
    default=0,
  )
