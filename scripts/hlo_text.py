"""The text of a compiled TPU program as computations and their instructions."""

import math
import re
from dataclasses import dataclass, field

DTYPE_BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
  "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.+)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class ArrayType:
  """An array of the program."""

  dtype: str
  shape: tuple[int, ...]
  layout: str = ""
  """Dimensions from the innermost on, tiles and memory, as in the program: 1,0:T(8,128)S(1)."""

  @property
  def in_hbm(self) -> bool:
    """Whether it lies in the chip's large memory."""
    return "S(" not in self.layout

  @property
  def nbytes(self) -> int:
    """Size in memory: the two innermost dimensions fill whole tiles, of 8 x 128 mostly."""
    sizes = list(self.shape)
    tile = re.search(r"T\((\d+),(\d+)\)", self.layout)
    order = [int(n) for n in self.layout.partition(":")[0].split(",") if n]
    if tile and len(order) > 1:
      for dimension, multiple in zip(order, (int(tile[2]), int(tile[1])), strict=False):
        sizes[dimension] += -sizes[dimension] % multiple
    return DTYPE_BYTES.get(self.dtype, 0) * math.prod(sizes)


@dataclass
class Instruction:
  """One operation."""

  name: str
  opcode: str
  types: list[ArrayType]
  operands: list[str]
  text: str
  is_root: bool

  def attribute(self, name: str) -> str | None:
    """The value of `name=..` up to the next comma outside brackets."""
    match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
    return match[1] if match else None

  def given(self, name: str) -> str:
    """The same of an attribute that instructions of this kind always have, without a leading %."""
    value = self.attribute(name)
    assert value is not None, (name, self.text)
    return value.lstrip("%")

  @property
  def callees(self) -> list[str]:
    """Computations that it runs."""
    return re.findall(
      r"(?:calls|to_apply|condition|body|branch_computations)=\{?%([\w.\-]+)", self.text
    )


@dataclass
class Computation:
  """Instructions by name, in order."""

  name: str
  instructions: dict[str, Instruction] = field(default_factory=dict)

  @property
  def root(self) -> Instruction:
    """What it gives."""
    return next(i for i in self.instructions.values() if i.is_root)

  def parameter(self, number: int) -> str | None:
    """Name of an input."""
    wanted = f"parameter({number})"
    return next((i.name for i in self.instructions.values() if wanted in i.text), None)


def parse_instruction(line: str) -> Instruction | None:
  """One line of a computation."""
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  rest = match[3]
  opcode = _OPCODE.search(rest)
  if not opcode:
    return None
  types = [
    ArrayType(m[1], tuple(int(n) for n in m[2].split(",") if n), m[3] or "")
    for m in _ARRAY.finditer(rest[: opcode.start(1)])
  ]
  depth, end = 1, opcode.end()
  while end < len(rest) and depth:
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  operands = re.findall(r"%([\w.\-]+)", rest[opcode.end() : end])
  return Instruction(match[2], opcode[1], types, operands, rest, bool(match[1]))


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and which one is run."""
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], Computation(header[2]))
      entry = header[2] if header[1] else entry
    elif line == "}":
      current = None
    elif current is not None and (instruction := parse_instruction(line)):
      current.instructions[instruction.name] = instruction
  for computation in computations.values():
    for instruction in computation.instructions.values():
      if instruction.opcode == "async-start":
        wrapped = computations[instruction.callees[0]].root.opcode
        if wrapped in ("slice", "copy"):
          instruction.opcode = f"{wrapped}-start"
  return computations, entry
