"""Programs run on arrays that stand for shapes, and are timed."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import chips, time_program
from scripts.aot import first_bucket, program_flops
from scripts.aot_programs import PROGRAMS, inputs, training_state
from scripts.chips import peak_of
from scripts.filled import filled
from tests import tiny
from tests.rl import group_case as case
from vrt_jax.config import MeshConfig
from vrt_jax.runtime import make_mesh
from vrt_jax.types import IGNORE_INDEX

EVAL = dataclasses.replace(tiny.train_config().eval, max_new_tokens=8)
CONFIG = dataclasses.replace(
  tiny.train_config(),
  image=tiny.IMAGE,
  grpo=dataclasses.replace(case.GRPO, prompt_buckets=((case.PROMPT_SLOTS, case.PATCHES),)),
  eval=EVAL,
)
ARGS = time_program.Args(config=Path("recipe.py"), batch=2, repeats=2)


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # a CPU orders the cache otherwise
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_again_and_again(program):
  report = time_program.time_program(dataclasses.replace(ARGS, program=program), CONFIG)
  assert report["program"] == program and report["batch"] == 2
  assert len(report["all_seconds"]) == 2 and min(report["all_seconds"]) > 0
  assert report["seconds"] > 0 and report["compile_seconds"] > 0
  assert report["mfu"] is None and report["peak_gib"] is None  # of a CPU nothing is published
  assert ("ms_a_token" in report) == (program == "decode")


def test_the_share_of_the_peak_is_that_of_model_flops(monkeypatch):
  monkeypatch.setattr(chips, "peak_of", lambda kind: 1e6)
  report = time_program.time_program(ARGS, CONFIG)
  flops = program_flops("sft", CONFIG, first_bucket("sft", CONFIG)).total
  assert report["mfu"] * 1e6 * report["seconds"] == pytest.approx(2 * flops, rel=0.01)


def test_every_slot_of_a_batch_holds_something():
  mesh = make_mesh(MeshConfig())
  shapes = inputs(CONFIG, mesh, 2, (40, 64))
  text, vision, picture = filled(shapes, visual_tokens=16, labelled=5, new_tokens=8)
  assert text.token_mask.all() and (vision.patch_segments == 1).all()
  assert text.visual_index.tolist() == [[*range(16), *[-1] * 24]] * 2
  assert text.position_ids[2, 1].tolist() == list(range(40))
  assert set(np.unique(picture)) == {0, 1}
  labels = filled({"targets": Named(text.input_ids)}, visual_tokens=0, labelled=5, new_tokens=8)
  assert (labels["targets"].labels != IGNORE_INDEX).sum(axis=1).tolist() == [5, 5]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
  labels: jax.Array


def test_weights_are_random_where_they_are_large():
  mesh = make_mesh(MeshConfig())
  large = jax.ShapeDtypeStruct((2**11, 2**10), jnp.bfloat16, sharding=mesh_whole(mesh))
  found = filled({"a": large, "b": large}, visual_tokens=0, labelled=0, new_tokens=0)
  a, b = (np.asarray(found[name], np.float32) for name in "ab")
  assert 0.019 < a.std() < 0.021 and 0.019 < b.std() < 0.021
  assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
  state = filled(training_state(CONFIG, mesh), visual_tokens=0, labelled=0, new_tokens=0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state[0]))


def mesh_whole(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize(
  ("kind", "peak"),
  [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
)
def test_published_peaks(kind, peak):
  assert peak_of(kind) == peak


def test_the_command_prints_a_report(monkeypatch, capsys, tmp_path):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from tests.scripts.test_time_program import CONFIG\ndef get_config():\n  return CONFIG\n"
  )
  words = ["--config", str(recipe), "--program", "prefill", "--repeats", "1"]
  words += ["--trace", str(tmp_path / "trace"), "--", "--eval.max-new-tokens", "4"]
  monkeypatch.setattr(sys, "argv", ["time_program", *words])
  time_program.main()
  report = json.loads(capsys.readouterr().out)
  assert report["batch"] == 1 and len(report["all_seconds"]) == 1
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))
