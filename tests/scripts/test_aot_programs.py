"""Programs of shapes equal those of real arrays; what cannot be compiled is refused in one line."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from scripts import aot, aot_programs, aot_report, aot_table
from tests import tiny
from tests.rl import group_case as case
from vrt_jax.config import MeshConfig
from vrt_jax.generate.decode import decode, prefill
from vrt_jax.generate.sampling import Sampling
from vrt_jax.ops.splash import PackedBlocks
from vrt_jax.placement import put_batch
from vrt_jax.runtime import MESH_AXES, make_mesh
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.state import create_state

CONFIG = tiny.train_config()


def described(tree: object) -> list[tuple]:
  return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]


def test_the_state_is_that_of_training():
  mesh = make_mesh(MeshConfig())
  optimizer = make_optimizer(CONFIG.optim)
  real = create_state(
    tiny.random_model(CONFIG.model), optimizer, trainable_filter(CONFIG.optim.trainable), mesh
  )
  shapes = aot_programs.training_state(CONFIG, mesh)
  assert described(shapes) == described(real)
  assert jax.tree.structure(shapes[0]) == jax.tree.structure(real[0])


def test_the_batch_is_that_of_training():
  mesh = make_mesh(MeshConfig())
  real = put_batch(tiny.batch(), mesh)
  batch, tokens = real.text.input_ids.shape
  bucket = (tokens, real.vision.pixel_values.shape[1])
  config = dataclasses.replace(CONFIG, image=tiny.IMAGE)
  text, vision, grounding = aot_programs.inputs(config, mesh, batch, bucket)
  for shapes, arrays in (
    (text, real.text),
    (vision, real.vision),
    (grounding, real.grounding_image),
  ):
    assert described(shapes) == described(arrays)
  lowered = aot_programs.lower_sft(config, mesh, batch, bucket)
  found = [(x.shape, x.dtype) for x in jax.tree.leaves(lowered.parts["batch"])]
  assert found == [(x.shape, x.dtype) for x in jax.tree.leaves(real)]


def test_the_update_of_a_group_takes_what_rollout_and_rewards_give():
  mesh = make_mesh(MeshConfig())
  config = dataclasses.replace(
    CONFIG, image=tiny.IMAGE, grpo=case.GRPO, optim=dataclasses.replace(case.OPTIM, batch_size=2)
  )
  bucket = (case.PROMPT_SLOTS, case.PATCHES)
  real = case.random_batch(2)
  lowered = aot_programs.lower_grpo(config, mesh, 2, bucket)
  found = lowered.parts["batch"]
  assert jax.tree.structure(found) == jax.tree.structure(real)
  for shape, array in zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True):
    assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
  rollout = aot_programs.lower_rollout(config, mesh, 2, bucket).lowered
  masks = rollout.out_info.low_res_masks
  assert masks.shape == (2, case.GRPO.group_size, case.GRPO.max_masks, 16, 16)


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # a CPU orders the cache otherwise
def test_the_loop_over_tokens_goes_on_from_a_prefill():
  evaluation = dataclasses.replace(CONFIG.eval, max_new_tokens=8, max_masks=case.GRPO.max_masks)
  config = dataclasses.replace(CONFIG, image=tiny.IMAGE, eval=evaluation)
  mesh, bucket = make_mesh(MeshConfig()), (case.PROMPT_SLOTS, case.PATCHES)
  lowered = aot_programs.lower_decode(config, mesh, 2, bucket)
  merged = dataclasses.replace(CONFIG.model, lora=dataclasses.replace(CONFIG.model.lora, rank=0))
  model, prompts = tiny.random_model(merged), case.inputs(2)
  state, logits = prefill(model, prompts, 8, evaluation.max_masks, aot_programs.IDS)
  language = {"language model": nnx.state(model.qwen.language_model), "cache": state.cache}
  for part, real in language.items():
    found = [(x.shape, x.dtype) for x in jax.tree.leaves(lowered.parts[part])]
    assert found == [(x.shape, x.dtype) for x in jax.tree.leaves(real)]
  wanted = decode(model, state, logits, Sampling(), aot_programs.IDS).tokens
  tokens = lowered.lowered.compile()(nnx.state(model), state, logits).tokens
  np.testing.assert_array_equal(tokens, wanted)


@pytest.mark.parametrize("program", aot_programs.PROGRAMS)
def test_every_program_has_a_bucket_and_flops(program):
  bucket = aot.first_bucket(program, CONFIG)
  assert aot.program_flops(program, CONFIG, bucket).total > 0


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
  mesh = jax.sharding.AbstractMesh((1, 4, 1), MESH_AXES)
  assert aot.fitted("sft", CONFIG, mesh, 8, 64)[1][0] == 64
  assert aot.fitted("sft", CONFIG, mesh, 8, 0) == (mesh, aot.first_bucket("sft", CONFIG))
  with pytest.raises(ValueError, match="a batch of 6 does not divide over data x fsdp = 4"):
    aot.fitted("sft", CONFIG, mesh, 6, 0)


def test_pairs_of_tokens_are_those_of_the_attention_masks():
  prompt, group, run = 6, 3, 4
  grpo = dataclasses.replace(CONFIG.grpo, group_size=group, max_new_tokens=run)
  config = dataclasses.replace(CONFIG, grpo=grpo)
  tokens = prompt + group * run
  mask = PackedBlocks((tokens, tokens), prompt, run)[slice(None), slice(None)]
  assert aot._text_pairs("grpo", config, prompt) == mask.mean()
  assert aot._text_pairs("sft", config, prompt) == np.tri(prompt).mean()


def test_bad_topologies(tmp_path):
  args = aot.Args(config=tmp_path, topology="v9:4x4")
  with pytest.raises(ValueError, match="none of v5e, v5p, v6e"):
    aot.compile_program(args, CONFIG)


def test_what_does_not_fit_is_said_in_one_line():
  class Lowered:
    def compile(self, compiler_options: dict) -> None:
      raise jax.errors.JaxRuntimeError(self.message)

  lowered = Lowered()
  lowered.message = "RESOURCE_EXHAUSTED: temporaries (19.96G) exceed HBM (15.75G).\nSee the page."
  with pytest.raises(ValueError, match=r"^the program does not fit: .* \(15.75G\)\.$"):
    aot_report.compile_to_text(lowered)
  lowered.message = "INTERNAL: another thing"
  with pytest.raises(jax.errors.JaxRuntimeError):
    aot_report.compile_to_text(lowered)


def test_a_table_has_a_line_for_each_report_that_is_there(tmp_path):
  report = {
    "program": "sft",
    "topology": "v5e:4x4",
    "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
    "batch_per_chip": 1.0,
    "accumulation_steps": 1,
    "bucket": {"tokens": 2560, "patches": 6272},
    "remat": "full",
    "trainable": "adapters",
    "memory": {"peak_gib": 3.636, "fits": True},
    "estimate": {
      "estimated_seconds": {"overlapped": 0.477, "serial": 0.574},
      "estimated_mfu": {"overlapped": 0.549, "serial": 0.473},
    },
    "collectives": {"all-gather": {"count": 2, "gigabytes": 18.0}},
    "compile_seconds": 100.0,
    "host_gib": 3.9,
  }
  (tmp_path / "v5e44_sft.json").write_text(aot_table.json.dumps(report))
  report |= {"batch_per_chip": 4.0, "accumulation_steps": 4}
  report |= {"bucket": {"tokens": 8192, "patches": 6272}}
  report |= {"mesh": {"data": 1, "fsdp": 4, "tensor": 4}}
  (tmp_path / "v5e44_sft_8192.json").write_text(aot_table.json.dumps(report))
  lines = aot_table.table(tmp_path).splitlines()
  assert len(lines) == 4
  seconds = "0.48 / 0.57 | 55 % / 47 % | 18.0"
  assert lines[2].startswith(f"| v5e:4x4 | SFT | 1 | full | 3.64 | yes | {seconds} |")
  named = "| v5e:4x4, fsdp 4 x tensor 4 | SFT, 8192 tokens | 4 x 1 | full | 3.64 |"
  assert lines[3].startswith(named)


@pytest.mark.slow
def test_a_program_for_tpus(tmp_path):
  pytest.importorskip("libtpu", reason="the extra [aot] is not installed")
  config = dataclasses.replace(CONFIG, image=tiny.IMAGE, mesh=MeshConfig(data=1, fsdp=-1))
  args = aot.Args(config=tmp_path, topology="v5e:2x2", batch_per_chip=1)
  report = aot.compile_program(args, config)
  assert report["memory"]["fits"] and report["collectives"]
