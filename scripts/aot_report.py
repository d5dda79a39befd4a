"""What a compiled TPU program needs: memory by part, collectives, and a roofline estimate."""

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from scripts.chips import GIB, Chip
from scripts.hlo import COLLECTIVES, Computation, Instruction, Program

_ASYNC_COPIES = ("copy-start", "copy-done", "slice-start", "slice-done")


def compile_to_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """The compiled program and the text of its final form.

  The compiler writes the text itself: `as_text` reads the program back, which fails in libtpu
  0.0.52 where gathers are given to a v6e's sparse cores.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=options)
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
  analysis = compiled.memory_analysis()
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
  for _, loop, times in program.scheduled():
    if loop.opcode != "while" or times != 1 or not re.search(r"jvp\(\)/while\"", loop.text):
      continue
    if "transpose" in loop.text:
      continue
    body = program.computations[loop.attribute("body").lstrip("%")]
    total += sum(
      body.instructions[name].types[0].nbytes
      for name in body.root.operands
      if name in body.instructions and _stores(program, body.instructions[name])
    )
  return total


def _stores(program: Program, instruction: Instruction) -> bool:
  if instruction.opcode == "fusion":
    return program.computations[instruction.callees[0]].root.opcode == "dynamic-update-slice"
  return instruction.opcode == "dynamic-update-slice" and bool(instruction.types)


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


def roofline(
  program: Program,
  chip: Chip,
  model_flops: float,
  moved: Mapping[str, Mapping[str, float]],
  text_pairs: float,
) -> dict:
  """An estimate of the step from published peaks: each operation at the slower of its two bounds.

  `overlapped`: collectives and copies run beside the operations; `serial`: after them.
  `text_pairs`: see `kernel_flops`.
  """
  busy = flops = hbm = 0.0
  for computation, instruction, times in program.scheduled():
    work = program.flops(computation, instruction) + kernel_flops(instruction, text_pairs)
    traffic = program.hbm_bytes(computation, instruction)
    flops, hbm = flops + work * times, hbm + traffic * times
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    if instruction.opcode not in _ASYNC_COPIES and kind not in COLLECTIVES:
      seconds = max(work / chip.peak_flops, traffic / chip.hbm_bytes_per_second)
      busy += seconds * times
  network = sum(v["gigabytes"] for v in moved.values()) * 1e9 / chip.ici_bytes_per_second
  overlapped = max(busy, hbm / chip.hbm_bytes_per_second, network)
  serial = busy + network
  return {
    "model_tflops": round(model_flops / 1e12, 2),
    "executed_tflops": round(flops / 1e12, 2),
    "hbm_gigabytes": round(hbm / 1e9, 1),
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
