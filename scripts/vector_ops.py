"""Work of a TPU's vector units: elementwise operations of a compiled program, one an element.

Matrix products and what moves data do not count. How many the units do a second is in
`scripts.chips`; where XLA's own cost model (`estimated_cycles` in the program) takes an operation
to be bound by them, as the hash of random numbers, it agrees within a tenth.
"""

import math

from scripts.hlo import Program
from scripts.hlo_text import Computation, Instruction

_PLAIN = (
  "abs", "add", "and", "ceil", "clamp", "compare", "convert", "floor", "maximum", "minimum",
  "multiply", "negate", "not", "or", "round-nearest-even", "select", "shift-left",
  "shift-right-arithmetic", "shift-right-logical", "sign", "subtract", "xor",
)  # fmt: skip
_SLOW = (
  "cosine", "divide", "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic",
  "power", "rsqrt", "sine", "sqrt", "tanh",
)  # fmt: skip
WEIGHTS = {name: 1 for name in _PLAIN} | {name: 4 for name in _SLOW} | {"erf": 20}
"""What an operation costs an element: transcendental functions have one slot a cycle, plain ones
four; erf is a polynomial."""


def vector_ops(program: Program, computation: Computation, instruction: Instruction) -> float:
  """Plain operations of an instruction, in fusions of all that is inside."""
  if instruction.opcode == "fusion":
    inner = [program.computations[callee] for callee in instruction.callees]
    return sum(vector_ops(program, c, i) for c in inner for i in c.instructions.values())
  if instruction.opcode == "reduce":
    summed = computation.instructions.get(instruction.operands[0])
    return float(math.prod(summed.types[0].shape)) if summed and summed.types else 0.0
  weight = WEIGHTS.get(instruction.opcode, 0)
  return float(weight * math.prod(instruction.types[0].shape)) if weight else 0.0
