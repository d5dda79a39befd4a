"""Reading a compiled program: trips of loops, FLOPs, bytes in HBM, collectives."""

import re
from dataclasses import replace

import pytest

from scripts.aot_report import (
  collectives,
  costliest,
  costs,
  group_size,
  kept_activations,
  kernel_flops,
  roofline,
  score_matrix_elements,
)
from scripts.chips import CHIPS, chip_of
from scripts.hlo import Program
from scripts.hlo_text import parse_instruction

TEXT = """
%fused (param_0.1: f32[4,8,8], param_1.1: s32[]) -> f32[8,8] {
  %param_0.1 = f32[4,8,8]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,8,8]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8]{1,0:T(8,128)} bitcast(%slice)
}

%cond (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %bound = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (q: (s32[], f32[8,8], f32[4,8,8])) -> (s32[], f32[8,8], f32[4,8,8]) {
  %q = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, f32[4,8,8]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %w = f32[4,8,8]{2,1,0:T(8,128)} get-tuple-element(%q), index=2
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %step)
  %layer = f32[8,8]{1,0:T(8,128)S(1)} fusion(%w, %j), kind=kLoop, calls=%fused
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %layer), dim_labels=bf_io->bf
  %sum = f32[8,8]{1,0:T(8,128)} all-reduce(%y), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, f32[4,8,8]{2,1,0:T(8,128)}) tuple(%next, %sum, %w)
}

ENTRY %main (a: (s32[], f32[8,8], f32[4,8,8])) -> f32[8,8] {
  %a = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, f32[4,8,8]{2,1,0:T(8,128)}) parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, f32[4,8,8]{2,1,0:T(8,128)}) while(%a), condition=%cond, body=%body
  ROOT %result = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
MATRIX = 8 * 128 * 4
"""Bytes of f32[8,8], whose rows are padded to 128."""


@pytest.fixture(scope="module")
def program() -> Program:
  return Program(TEXT)


def find(program: Program, name: str):
  return next((c, i, n) for c, i, n in program.scheduled() if i.name == name)


def test_a_loop_runs_bound_over_step_times(program):
  assert program.runs["body"] == 4
  assert Program(TEXT.replace("constant(2)", "constant(1)")).runs["body"] == 8


def test_a_loop_goes_on_where_the_one_before_ended():
  """From 8 to 20 in steps of 2."""
  conditions = re.search(r"%cond .*?\n}\n", TEXT, re.DOTALL)[0]
  later = conditions.replace("%cond", "%later").replace("constant(8)", "constant(20)")
  kind = "(s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, f32[4,8,8]{2,1,0:T(8,128)})"
  second = f"""
  %at = s32[]{{:T(128)}} get-tuple-element(%loop), index=0
  %as_it_was = s32[]{{:T(128)}} copy(%at)
  %state = f32[8,8]{{1,0:T(8,128)}} get-tuple-element(%loop), index=1
  %weights = f32[4,8,8]{{2,1,0:T(8,128)}} get-tuple-element(%loop), index=2
  %values = {kind} tuple(%as_it_was, %state, %weights)
  %more = {kind} while(%values), condition=%later, body=%body
  ROOT %result = f32[8,8]{{1,0:T(8,128)}} get-tuple-element(%more), index=1
"""
  end = re.search(r"\n  ROOT %result.*\n", TEXT)[0]
  text = later + TEXT.replace(end, second)
  assert Program(text).runs["body"] == 4 + 6
  assert Program(text.replace("copy(%at)", "constant(0)")).runs["body"] == 4 + 10


def test_a_loop_that_may_end_earlier_runs_to_its_bound():
  early = TEXT.replace(
    "  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT",
    "  %less = pred[]{:T(512)} compare(%i, %bound), direction=LT\n"
    "  %more = pred[]{:T(512)} constant(true)\n"
    "  ROOT %both = pred[]{:T(512)} and(%less, %more)",
  )
  assert Program(early).runs["body"] == 4


@pytest.mark.parametrize(
  "branches",
  ["branch_computations={%some, %other}", "true_computation=%some, false_computation=%other"],
)
def test_all_branches_of_a_conditional_count(branches):
  branch = """
%{} (t: f32[8,8]) -> f32[8,8] {{
  %t = f32[8,8]{{1,0:T(8,128)}} parameter(0)
  ROOT %twice = f32[8,8]{{1,0:T(8,128)}} add(%t, %t)
}}
"""
  taken = f"  %sum = f32[8,8]{{1,0:T(8,128)}} conditional(%j, %y, %y), {branches}"
  lines = [taken if "%sum =" in line else line for line in TEXT.splitlines()]
  runs = Program(branch.format("some") + branch.format("other") + "\n".join(lines)).runs
  assert (runs["some"], runs["other"]) == (4, 4)


def test_flops_of_a_matrix_product(program):
  computation, instruction, _ = find(program, "y")
  assert program.flops(computation, instruction) == 2 * 8 * 8 * 8


def test_a_dilated_batch_dimension_does_not_count_its_padding():
  """A product [4, 8, 16] x [4, 16, 8] as a convolution over the batch."""
  text = """
ENTRY %main (x: f32[4,8,16], k: f32[4,16,8]) -> f32[4,8,8] {
  %x = f32[4,8,16]{2,1,0} parameter(0)
  %k = f32[4,16,8]{2,1,0} parameter(1)
  ROOT %y = f32[4,8,8]{2,1,0} convolution(%x, %k), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501
  program = Program(text)
  computation, instruction, _ = find(program, "y")
  assert program.flops(computation, instruction) == 2 * 4 * 8 * 8 * 16


def test_heads_of_a_projection_count_whatever_the_order_of_the_window():
  """A product [2, 16, 32] x [8, 4, 32], row by head by feature; heads are the second dimension."""
  text = """
ENTRY %main (x: f32[2,16,32,1], k: f32[8,4,32,1]) -> f32[2,16,8,4] {
  %x = f32[2,16,32,1]{2,1,0,3} parameter(0)
  %k = f32[8,4,32,1]{2,1,0,3} parameter(1)
  ROOT %y = f32[2,16,8,4]{3,1,2,0} convolution(%x, %k), window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
}
"""  # noqa: E501
  program = Program(text)
  computation, instruction, _ = find(program, "y")
  assert program.flops(computation, instruction) == 2 * (2 * 16) * (8 * 4) * 32


def test_bytes_in_hbm(program):
  computation, instruction, _ = find(program, "layer")
  assert program.hbm_bytes(computation, instruction) == MATRIX + 4  # one layer's slice, the index
  computation, instruction, _ = find(program, "y")
  assert program.hbm_bytes(computation, instruction) == 2 * MATRIX  # the layer is in fast memory


def test_collectives_count_every_run(program):
  assert collectives(program) == {
    "all-reduce": {"count": 4, "gigabytes": round(4 * 2 * 0.75 * MATRIX / 1e9, 3)}
  }


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups={{0,1,2},{3,4,5}}", 3),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
  ],
)
def test_group_size(text, size):
  assert group_size(text) == size


def test_kernel_flops():
  shapes = "bf16[16,256,64]{2,1,0}, bf16[16,512,64]{2,1,0}, bf16[16,512,64]{2,1,0}, s32[256,128]"
  line = (
    f"  %splash_mha_fwd.1 = bf16[16,256,64] custom-call(%q, %k, %v), "
    f'custom_call_target="tpu_custom_call", operand_layout_constraints={{{shapes}}}'
  )
  assert kernel_flops(parse_instruction(line), 0.25) == 4 * 16 * 256 * 512 * 64
  backward = parse_instruction(line.replace("mha_fwd", "mha_dkv"))
  assert kernel_flops(backward, 0.25) == 10 * 16 * 256 * 512 * 64
  grouped = parse_instruction(line.replace("bf16[16,512,64]", "bf16[4,512,64]"))
  assert kernel_flops(grouped, 0.25) == 0.25 * 4 * 16 * 256 * 512 * 64


def test_roofline_takes_the_slower_bound(program):
  chip = CHIPS["v5e"]
  moved = collectives(program)
  found = roofline(costs(program, chip, 0.5), chip, 1e12, moved)
  assert found["executed_tflops"] == round(4 * 1024 / 1e12, 2)
  assert found["estimated_seconds"]["serial"] >= found["estimated_seconds"]["overlapped"]
  assert found["ridge_flops_a_byte"] == pytest.approx(197e12 / 819e9, abs=0.1)


def test_the_costliest_lines_are_told_with_their_bound():
  """Both products of the loop come from one line; a fast memory makes arithmetic their limit."""
  name = 'metadata={op_name="jit(step)/while/body/closed_call/mlp/dot_general"}'
  text = TEXT.replace("dim_labels=bf_io->bf", f"dim_labels=bf_io->bf, {name}")
  slow = replace(CHIPS["v5e"], peak_flops=1e6, hbm_bytes_per_second=1e12)
  lines = costliest(costs(Program(text), slow, 0.5), 2)
  assert len(lines) == 2
  assert lines[0]["operation"] == "mlp/dot_general f32[8, 8]"
  assert lines[0]["seconds"] == pytest.approx(4 * 1024 / 1e6, abs=1e-4)
  assert lines[0]["bound"] == "arithmetic" and lines[0]["share"] > 0.99
  assert lines[0]["flops_a_byte"] == pytest.approx(1024 / (2 * MATRIX), abs=0.1)
  usual = costliest(costs(Program(text), replace(slow, peak_flops=1e15), 0.5))
  assert {line["bound"] for line in usual} == {"memory"}


def test_a_score_matrix_would_be_seen(program):
  assert score_matrix_elements(program, {8}) == 4 * 8 * 8
  assert score_matrix_elements(program, {4, 9}) == 0


def test_unknown_chips_are_refused():
  with pytest.raises(ValueError, match="none of v5e, v5p, v6e"):
    chip_of("v9:2x2")


FUSED = """
%slice_of (param_0.2: f32[36,8,8], param_1.2: s32[]) -> f32[1,8,8] {
  %param_0.2 = f32[36,8,8]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = f32[1,8,8]{2,1,0:T(8,128)} dynamic-slice(%param_0.2, %param_1.2), dynamic_slice_sizes={1,8,8}
}

%async_fusion (param_0.3: f32[64], param_1.3: f32[1024], param_2.3: f32[36,8,8], param_3.3: s32[]) -> (f32[1,8,8], f32[64], f32[1024]) {
  %param_0.3 = f32[64]{0:T(128)} parameter(0)
  %param_1.3 = f32[1024]{0:T(128)} parameter(1)
  %param_2.3 = f32[36,8,8]{2,1,0:T(8,128)} parameter(2)
  %param_3.3 = s32[]{:T(128)} parameter(3)
  %gathered = f32[1024]{0:T(128)} all-gather(%param_0.3), channel_id=1, replica_groups=[1,16]<=[16]
  %layer.1 = f32[1,8,8]{2,1,0:T(8,128)} fusion(%param_2.3, %param_3.3), kind=kLoop, calls=%slice_of
  ROOT %tuple.1 = (f32[1,8,8]{2,1,0:T(8,128)}, f32[64]{0:T(128)}, f32[1024]{0:T(128)}) tuple(%layer.1, %param_0.3, %param_1.3)
}

%kept (param_0.4: f32[36,8,8], param_1.4: f32[1,8,8], param_2.4: s32[]) -> (f32[36,8,8], f32[1,8,8]) {
  %param_0.4 = f32[36,8,8]{2,1,0:T(8,128)} parameter(0)
  %param_1.4 = f32[1,8,8]{2,1,0:T(8,128)} parameter(1)
  %param_2.4 = s32[]{:T(128)} parameter(2)
  %doubled = f32[1,8,8]{2,1,0:T(8,128)} add(%param_1.4, %param_1.4)
  %update = f32[36,8,8]{2,1,0:T(8,128)} dynamic-update-slice(%param_0.4, %doubled, %param_2.4)
  ROOT %tuple.2 = (f32[36,8,8]{2,1,0:T(8,128)}, f32[1,8,8]{2,1,0:T(8,128)}) tuple(%update, %doubled)
}

ENTRY %main (a: f32[64], b: f32[1024], c: f32[36,8,8], d: s32[], e: f32[1,8,8]) -> f32[1,8,8] {
  %a = f32[64]{0:T(128)} parameter(0)
  %b = f32[1024]{0:T(128)} parameter(1)
  %c = f32[36,8,8]{2,1,0:T(8,128)} parameter(2)
  %d = s32[]{:T(128)S(6)} parameter(3)
  %e = f32[1,8,8]{2,1,0:T(8,128)S(1)} parameter(4)
  %beside = (f32[1,8,8]{2,1,0:T(8,128)S(1)}, f32[64]{0:T(128)}, f32[1024]{0:T(128)}) fusion(%a, %b, %c, %d), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_fusion
  %keep = (f32[36,8,8]{2,1,0:T(8,128)}, f32[1,8,8]{2,1,0:T(8,128)}) fusion(%c, %e, %d), kind=kLoop, calls=%kept
  ROOT %out.1 = f32[1,8,8]{2,1,0:T(8,128)} get-tuple-element(%keep), index=1
}
"""  # noqa: E501


def test_a_fusion_beside_a_collective_counts_its_own_operands_and_no_buffer_passed_on():
  program = Program(FUSED)
  computation, instruction, _ = find(program, "beside")
  assert program.hbm_bytes(computation, instruction) == MATRIX  # a layer, sliced two levels down


def test_a_result_that_is_updated_in_place_counts_the_update_alone():
  program = Program(FUSED)
  computation, instruction, _ = find(program, "keep")
  assert program.hbm_bytes(computation, instruction) == 2 * MATRIX  # the update and the second


HEAD = """
%same (p.6: f32[64,8]) -> f32[64,8] {
  %p.6 = f32[64,8]{1,0:T(8,128)} parameter(0)
  ROOT %bitcast.6 = f32[64,8]{1,0:T(8,128)} bitcast(%p.6)
}

%largest (p.7: f32[64,8], p.8: f32[1,8]) -> f32[1,64] {
  %p.7 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %p.8 = f32[1,8]{1,0:T(1,128)S(1)} parameter(1)
  %table = f32[64,8]{1,0:T(8,128)} fusion(%p.7), kind=kLoop, calls=%same
  ROOT %logits = f32[1,64]{1,0:T(1,128)} convolution(%p.8, %table), dim_labels=bf_oi->bf
}

ENTRY %main (t: f32[64,8], h: f32[1,8]) -> f32[1,64] {
  %t = f32[64,8]{1,0:T(8,128)} parameter(0)
  %h = f32[1,8]{1,0:T(1,128)S(1)} parameter(1)
  ROOT %head = f32[1,64]{1,0:T(1,128)S(1)} fusion(%t, %h), kind=kOutput, calls=%largest
}
"""


def test_a_matrix_that_an_inner_fusion_hands_on_is_read():
  program = Program(HEAD)
  computation, instruction, _ = find(program, "head")
  assert program.hbm_bytes(computation, instruction) == 64 * 128 * 4  # rows of 8 are padded


PREFETCHED = """
%take (p.5: s8[4096]) -> s8[1024] {
  %p.5 = s8[4096]{0:T(1024)} parameter(0)
  ROOT %slice.5 = s8[1024]{0:T(1024)S(1)} slice(%p.5), slice={[0:1024]}
}

ENTRY %main (w: s8[4096], x: f32[8,8]) -> f32[8,8] {
  %w = s8[4096]{0:T(1024)} parameter(0)
  %x = f32[8,8]{1,0:T(8,128)} parameter(1)
  %slice-start.1 = ((s8[4096]{0:T(1024)}), s8[1024]{0:T(1024)S(1)}, s32[]{:S(2)}) async-start(%w), calls=%take
  %slice-done.1 = s8[1024]{0:T(1024)S(1)} async-done(%slice-start.1)
  %copy-start.1 = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  ROOT %copy-done.1 = f32[8,8]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
}
"""  # noqa: E501


def test_prefetches_are_known_and_move_their_slice_once():
  program = Program(PREFETCHED)
  computation, instruction, _ = find(program, "slice-start.1")
  assert instruction.opcode == "slice-start"
  assert program.hbm_bytes(computation, instruction) == 1024
  computation, instruction, _ = find(program, "copy-start.1")
  assert program.hbm_bytes(computation, instruction) == MATRIX


GATHERED = """
%end (p.9: f32[8,4], p.10: f32[8,64]) -> f32[8,64] {
  %p.9 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %p.10 = f32[8,64]{1,0:T(8,128)} parameter(1)
  %all-gather.9 = f32[8,64]{1,0:T(8,128)} all-gather(%p.9), channel_id=3, replica_groups=[1,16]<=[16], dimensions={1}
  ROOT %done = f32[8,64]{1,0:T(8,128)} custom-call(%p.9, %p.10, %all-gather.9), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: f32[8,4]) -> f32[8,64] {
  %w = f32[8,4]{1,0:T(8,128)} parameter(0)
  %buffer = f32[8,64]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %end.1 = f32[8,64]{1,0:T(8,128)} fusion(%w, %buffer), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""  # noqa: E501


def test_a_buffer_and_the_end_of_a_collective_that_fills_it_move_nothing_more():
  program = Program(GATHERED)
  computation, instruction, _ = find(program, "buffer")
  assert program.hbm_bytes(computation, instruction) == 0
  computation, instruction, _ = find(program, "end.1")
  assert program.hbm_bytes(computation, instruction) == 8 * 128 * 4  # its part


KEPT = """
%layer (p.11: f32[36,8,4], p.12: s32[]) -> (f32[8,4], f32[36,8,4]) {
  %p.11 = f32[36,8,4]{2,1,0:T(8,128)} parameter(0)
  %p.12 = s32[]{:T(128)} parameter(1)
  %value = f32[1,8,4]{2,1,0:T(8,128)} broadcast(%p.12), dimensions={}
  %stored = f32[36,8,4]{2,1,0:T(8,128)} dynamic-update-slice(%p.11, %value, %p.12, %p.12, %p.12)
  %state = f32[8,4]{1,0:T(8,128)} bitcast(%value)
  ROOT %both = (f32[8,4]{1,0:T(8,128)}, f32[36,8,4]{2,1,0:T(8,128)}) tuple(%state, %stored)
}

%body (s.1: (s32[], f32[8,4], f32[36,8,4])) -> (s32[], f32[8,4], f32[36,8,4]) {
  %s.1 = (s32[], f32[8,4], f32[36,8,4]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %kept.1 = f32[36,8,4]{2,1,0:T(8,128)} get-tuple-element(%s.1), index=2
  %fused = (f32[8,4]{1,0:T(8,128)}, f32[36,8,4]{2,1,0:T(8,128)}) fusion(%kept.1, %i.1), kind=kLoop, calls=%layer
  %x.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%fused), index=0
  %kept.2 = f32[36,8,4]{2,1,0:T(8,128)} get-tuple-element(%fused), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i.1, %one)
  ROOT %t.1 = (s32[], f32[8,4], f32[36,8,4]) tuple(%next, %x.1, %kept.2)
}

%more (s.2: (s32[], f32[8,4], f32[36,8,4])) -> pred[] {
  %s.2 = (s32[], f32[8,4], f32[36,8,4]) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %layers = s32[]{:T(128)} constant(36)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %layers), direction=LT
}

ENTRY %main (a: (s32[], f32[8,4], f32[36,8,4])) -> (s32[], f32[8,4], f32[36,8,4]) {
  %a = (s32[], f32[8,4], f32[36,8,4]) parameter(0)
  ROOT %w = (s32[], f32[8,4], f32[36,8,4]) while(%a), condition=%more, body=%body, metadata={op_name="jit(step)/jvp()/while"}
}
"""  # noqa: E501


def test_activations_are_the_arrays_that_a_forward_loop_fills():
  assert kept_activations(Program(KEPT)) == 36 * 8 * 128 * 4
  assert kept_activations(Program(KEPT.replace("jvp()/while", "transpose(jvp())/while"))) == 0
  changed = KEPT.replace("dynamic-update-slice(%p.11, %value, %p.12, %p.12, %p.12)", "copy(%p.11)")
  assert kept_activations(Program(changed)) == 0
