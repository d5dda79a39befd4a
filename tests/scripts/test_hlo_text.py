"""Reading the arrays of a compiled program."""

import pytest

from scripts.hlo_text import parse_instruction


@pytest.mark.parametrize(
  ("kind", "elements"),
  [
    ("f32[3,8,8]{2,1,0:T(8,128)}", 3 * 8 * 128),
    ("f32[3,8,8]{0,2,1:T(8,128)}", 8 * 8 * 128),  # rows of the first dimension
    ("f32[1,64]{1,0:T(1,128)}", 128),
    ("f32[5,8,8]{2,1,0}", 5 * 8 * 8),
    ("f32[100]{0:T(128)}", 100),
  ],
)
def test_an_array_fills_whole_tiles(kind, elements):
  assert parse_instruction(f"  %x = {kind} parameter(0)").types[0].nbytes == 4 * elements


def test_fast_memory_is_told_from_hbm():
  for layout, in_hbm in (("{1,0:T(8,128)}", True), ("{1,0:T(8,128)S(1)}", False), ("", True)):
    instruction = parse_instruction(f"  %x = f32[8,8]{layout} parameter(0)")
    assert instruction.types[0].in_hbm == in_hbm
