"""Elementwise work of a program: what counts, how much, and when it is the bound."""

import dataclasses

import pytest

from scripts.aot_report import compiler_seconds, costliest, costs
from scripts.chips import CHIPS, chip_of
from scripts.hlo import Program
from scripts.vector_ops import vector_ops

ELEMENTS = 8 * 8
TEXT = """
%fused (p0: f32[8,8], p1: f32[8,8]) -> f32[8,8] {
  %p0 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %p1 = f32[8,8]{1,0:T(8,128)} parameter(1)
  %moved = f32[8,8]{1,0:T(8,128)} copy(%p1)
  %sum = f32[8,8]{1,0:T(8,128)} add(%p0, %moved)
  %squashed = f32[8,8]{1,0:T(8,128)} tanh(%sum)
  ROOT %y = f32[8,8]{1,0:T(8,128)} convolution(%squashed, %p1), dim_labels=bf_io->bf
}

%plus (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8,8], w: f32[8,8]) -> f32[8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %w = f32[8,8]{1,0:T(8,128)} parameter(1)
  %zero = f32[] constant(0)
  %both = f32[8,8]{1,0:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%fused, metadata={op_name="a"}
  ROOT %rows = f32[8]{0:T(128)} reduce(%both, %zero), dimensions={1}, to_apply=%plus
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
  return Program(TEXT)


@pytest.mark.parametrize(("name", "ops"), [("both", 1 + 4), ("rows", 1), ("x", 0), ("zero", 0)])
def test_an_element_counts_once_an_operation(program, name, ops):
  """Of a fusion all that is inside but the product and what moves data; tanh counts four times."""
  main = program.computations["main"]
  assert vector_ops(program, main, main.instructions[name]) == ops * ELEMENTS


def test_it_is_the_bound_where_the_units_are_slow(program):
  chip = chip_of("v5e:4x4")
  slow = dataclasses.replace(chip, clock=1 / 4096)
  assert slow.vector_ops_per_second == 1.0
  (fusion,) = (c for c in costs(program, slow, 0.5) if c.instruction.name == "both")
  assert fusion.seconds == fusion.bounds["vector"] == 5 * ELEMENTS
  assert costliest(costs(program, slow, 0.5), 1)[0]["bound"] == "vector"
  assert costliest(costs(program, chip, 0.5), 1)[0]["bound"] == "memory"


def test_the_clock_is_that_at_which_products_have_their_peak():
  """A core has four units of 128 x 128, a v6e's of 256 x 256; v5p has two cores."""
  for name, multipliers in (("v5e", 4 * 128**2), ("v5p", 4 * 128**2), ("v6e", 4 * 256**2)):
    chip = CHIPS[name]
    assert chip.peak_flops == pytest.approx(2 * chip.cores * multipliers * chip.clock, rel=0.01)


def test_the_compilers_cycles_count_as_often_as_an_operation_runs(program):
  chip = chip_of("v5e:4x4")
  assert compiler_seconds(program, chip) == 0.0
  told = TEXT.replace('metadata={op_name="a"}', 'backend_config={"estimated_cycles":"3000"}')
  assert compiler_seconds(Program(told), chip) == pytest.approx(3000 / 1.5e9)
  unknown = told.replace('"3000"', f'"{2**63 - 1}"')
  assert compiler_seconds(Program(unknown), chip) == 0.0
