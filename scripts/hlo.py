"""Reads a compiled TPU program's text: how often each operation runs, its FLOPs and its bytes.

XLA's own cost analysis counts the body of a loop once; here every computation has the number of
times that it runs, from the loops' bounds. Bytes are those between the chip's memory (HBM) and its
cores: operands and results in fast memory (layouts with "S(1)") do not count, and of an operand
that is only sliced the slice alone does.
"""

import math
import re
from functools import cached_property

from scripts.hlo_text import Computation, Instruction, parse_program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = (
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "opt-barrier", "async-start", "async-update",
)  # fmt: skip


class Program:
  """A compiled program of one device."""

  def __init__(self, text: str):
    self.computations, self.entry = parse_program(text)

  @cached_property
  def runs(self) -> dict[str, float]:
    """How often each computation that stands in the schedule runs; the inside of fusions is not.

    At most: all branches of a conditional are counted.
    """
    counts: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
      counts[name] = counts.get(name, 0) + times
      for i in self.computations[name].instructions.values():
        if i.opcode == "while":
          visit(i.given("body"), times * self.trip_count(self.computations[name], i))
        elif i.opcode in ("call", "async-start"):
          for callee in i.callees:
            visit(callee, times)
        elif i.opcode == "conditional":
          for kind in ("branch_computations", "true_computation", "false_computation"):
            for branch in re.findall(r"%([\w.\-]+)", i.attribute(kind) or ""):
              visit(branch, times)

    visit(self.entry, 1)
    return counts

  def trip_count(self, computation: Computation, loop: Instruction) -> int:
    """Of a loop up to a constant: from 0, or from where the loop before it ends, by its step.

    A loop that may end earlier is taken to run to its bound.
    """
    index, step = self._counter(loop)
    return -(-(self._bound(loop) - self._start(computation, loop, index)) // step)

  def _bound(self, loop: Instruction) -> int:
    """The constant that a loop's condition compares its counter with; 1 where there is none."""
    condition = self.computations[loop.given("condition")]
    compare = condition.root
    if compare.opcode == "fusion":
      inner = self.computations[compare.callees[0]]
      found = [_constant(inner, name) for name in inner.root.operands]
    else:
      found = [_constant(condition, name) for name in compare.operands]
    bounds = [n for n in found if n is not None]
    if not bounds:  # a fusion gets it from outside, or it is one condition of several
      inside = [self.computations[c] for i in condition.instructions.values() for c in i.callees]
      everything = [i for c in (condition, *inside) for i in c.instructions.values()]
      bounds = [n for i in everything if (n := _value(i)) is not None]
    return max(bounds, default=1)

  def _start(self, computation: Computation, loop: Instruction, index: int | None) -> int:
    """The bound of the loop that a loop's counter comes from, 0 where it comes from none."""
    if index is None:
      return 0
    values = computation.instructions[loop.operands[0]]
    if values.opcode != "tuple":
      return 0
    first = computation.instructions[values.operands[index]]
    while first.opcode in ("copy", "bitcast", "get-tuple-element"):
      first = computation.instructions[first.operands[0]]
    return self._bound(first) if first.opcode == "while" else 0

  def _counter(self, loop: Instruction) -> tuple[int | None, int]:
    """Which of a loop's values its condition reads and its body adds to, and how much."""
    condition = self.computations[loop.given("condition")]
    body = self.computations[loop.given("body")]
    for found in condition.instructions.values():
      if found.opcode != "get-tuple-element":
        continue
      index = int(found.given("index"))
      if index >= len(body.root.operands):
        continue
      added = body.instructions.get(body.root.operands[index])
      while added is not None and added.opcode in ("copy", "bitcast"):
        added = body.instructions.get(added.operands[0])
      if added is not None and added.opcode == "add":
        steps = [n for name in added.operands if (n := _constant(body, name)) is not None]
        if steps:
          return index, max(steps)
    return None, 1

  def scheduled(self) -> list[tuple[Computation, Instruction, float]]:
    """(computation, instruction, times) of all that runs."""
    return [
      (self.computations[name], instruction, times)
      for name, times in self.runs.items()
      for instruction in self.computations[name].instructions.values()
    ]

  def flops(self, computation: Computation, instruction: Instruction) -> float:
    """Of matrix products and convolutions; inside fusions too."""
    if instruction.opcode in ("convolution", "dot"):
      return convolution_flops(computation, instruction)
    if instruction.opcode != "fusion":
      return 0.0
    inner = [self.computations[callee] for callee in instruction.callees]
    return sum(self.flops(c, i) for c in inner for i in c.instructions.values())

  def hbm_bytes(self, computation: Computation, instruction: Instruction) -> float:
    """What an instruction moves between HBM and the cores."""
    if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith("-done"):
      return 0.0
    if 'custom_call_target="AllocateBuffer"' in instruction.text:
      return 0.0
    if instruction.opcode == "fusion":
      return self._fusion_bytes(computation, instruction)
    if instruction.opcode in ("copy-start", "slice-start"):  # (to, from, ..), ((from), to, ..)
      ends = instruction.types[:2]
      moved = ends[0 if instruction.opcode == "copy-start" else 1].nbytes
      return float(moved * sum(end.in_hbm for end in ends))
    written = sum(t.nbytes for t in instruction.types if t.in_hbm)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
      return 2.0 * written
    if instruction.opcode == "dynamic-update-slice":
      return 2.0 * self._operand_bytes(computation, instruction.operands[1])
    return written + sum(self._operand_bytes(computation, name) for name in instruction.operands)

  def _operand_bytes(self, computation: Computation, name: str) -> float:
    operand = computation.instructions.get(name)
    return sum(t.nbytes for t in operand.types if t.in_hbm) if operand else 0.0

  def _fusion_bytes(self, computation: Computation, fusion: Instruction) -> float:
    inner = self.computations[fusion.callees[0]]
    passed_on = re.findall(r"\{(\d*)\}: \((\d+),", fusion.text)  # results that are operands too
    outputs, inputs = ({int(pair[n] or 0) for pair in passed_on} for n in (0, 1))
    in_place = _is_collective(inner)
    total = 0.0
    for number, name in enumerate(fusion.operands):
      whole = self._operand_bytes(computation, name)
      if whole and not (in_place and number in inputs):
        total += self._bytes_read(inner, inner.parameter(number), whole)
    results = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
    for number, (result, kind) in enumerate(zip(results, fusion.types, strict=False)):
      if kind.in_hbm and not (in_place and number in outputs):
        total += self._bytes_written(inner, result)
    return total

  def _bytes_read(self, inner: Computation, name: str | None, whole: float) -> float:
    """Of the `whole` bytes of a fusion's operand: all, or the slices that its users take."""
    total = 0.0
    for user in inner.instructions.values():
      if name not in user.operands:
        continue
      if user.opcode in ("dynamic-slice", "slice", "gather"):
        total += sum(t.nbytes for t in user.types)
      elif user.opcode == "bitcast":
        total += self._bytes_read(inner, user.name, whole)
      elif user.opcode == "fusion":
        callee = self.computations[user.callees[0]]
        for number in (n for n, operand in enumerate(user.operands) if operand == name):
          parameter = callee.parameter(number)
          total += self._bytes_read(callee, parameter, whole)
          if _gives_as_it_is(callee, parameter):
            total += self._bytes_read(inner, user.name, whole)
      elif user.opcode == "dynamic-update-slice" and name not in user.operands[1:]:
        continue  # updated in place
      elif user.opcode != "tuple":
        total += whole
    return min(total, whole)

  def _bytes_written(self, inner: Computation, name: str) -> float:
    """Of a fusion's result: all, or the part that is updated in place."""
    computation, origin = self.origin(inner, name)
    if origin.opcode == "parameter":
      return 0.0
    if origin.opcode == "dynamic-update-slice":
      return float(sum(t.nbytes for t in computation.instructions[origin.operands[1]].types))
    return float(sum(t.nbytes for t in inner.instructions[name].types))

  def origin(self, computation: Computation, name: str) -> tuple[Computation, Instruction]:
    """Where an array is made: behind bitcasts, elements of tuples and fusions."""
    found, index = computation.instructions[name], 0
    while found.opcode in ("bitcast", "get-tuple-element", "fusion"):
      if found.opcode == "fusion":
        computation = self.computations[found.callees[0]]
        root = computation.root
        name, index = root.operands[index] if root.opcode == "tuple" else root.name, 0
      else:
        name, index = found.operands[0], int(found.attribute("index") or index)
      found = computation.instructions[name]
    return computation, found


def _gives_as_it_is(computation: Computation, parameter: str | None) -> bool:
  """Whether a parameter is the result, with no more than another shape."""
  result = computation.root
  while result.opcode == "bitcast":
    result = computation.instructions[result.operands[0]]
  return result.name == parameter


def _is_collective(computation: Computation) -> bool:
  """Whether a fusion carries a part of a collective beside its own work."""
  kinds = {i.opcode.removesuffix("-start") for i in computation.instructions.values()}
  return not kinds.isdisjoint(COLLECTIVES)


def _constant(computation: Computation, name: str) -> int | None:
  instruction = computation.instructions.get(name)
  return None if instruction is None else _value(instruction)


def _value(instruction: Instruction) -> int | None:
  """The value of an integer constant."""
  match = re.search(r"\bconstant\((\d+)\)", instruction.text)
  return int(match[1]) if match and instruction.opcode == "constant" else None


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
  """2 x multiplications of a convolution or matrix product, those with padding not counted.

  A product with batch dimensions is written as a convolution whose kernel is dilated so that most
  positions fall on padding; they are told by window arithmetic.
  """
  types = [computation.instructions[name].types[0] for name in instruction.operands[:2]]
  out = math.prod(instruction.types[0].shape)
  if instruction.opcode == "dot":
    contracted = instruction.given("lhs_contracting_dims").strip("{}").split(",")
    return 2.0 * out * math.prod(types[0].shape[int(n)] for n in contracted if n)
  lhs_labels, rhs_labels, out_labels = re.split("_|->", instruction.given("dim_labels"))
  features = types[1].shape[rhs_labels.index("i")]
  window = re.search(r"window=\{([^}]*)\}", instruction.text)
  settings = dict(part.split("=") for part in window[1].split()) if window else {}
  pairs = 1.0
  for label in (c for c in rhs_labels if c.isdigit()):
    size = types[1].shape[rhs_labels.index(label)]
    positions = instruction.types[0].shape[out_labels.index(label)]
    length = types[0].shape[lhs_labels.index(label)]
    out //= positions
    pairs *= _window_pairs(settings, int(label), size, positions, length)
  return 2.0 * out * features * pairs


def _window_pairs(settings: dict[str, str], n: int, size: int, positions: int, length: int) -> int:
  """(output position, kernel position) pairs of a dimension that meet an input value."""

  def setting(name: str, default: str) -> str:
    return settings[name].split("x")[n] if name in settings else default

  stride, dilation = int(setting("stride", "1")), int(setting("rhs_dilate", "1"))
  spacing, low = int(setting("lhs_dilate", "1")), int(setting("pad", "0_0").split("_")[0])
  extent = (length - 1) * spacing + 1
  count = 0
  for k in range(size):
    for position in range(positions):
      at = position * stride + k * dilation - low
      count += 0 <= at < extent and at % spacing == 0
  return count
