"""A rollout and an update of the tiny model on several meshes of eight CPU devices, into a file.

    python -m tests.rl.on_meshes OUT.npz one 2x2x2 tpu

Arrays are named `<run>/<what>`: the rollout, and metrics, parameters and moments after the update.
"tpu" is "2x2x2" as programs are for TPUs.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from tests import tiny
from tests.rl import group_case as case
from tests.tpu_forms import tpu_forms
from tests.train.on_meshes import MESHES, mesh_of
from vrt_jax.config import SftLossConfig
from vrt_jax.placement import batch_sharding, place, put_whole_batch, replicate
from vrt_jax.rl.policy import GrpoBatch
from vrt_jax.rl.rollout import Rollout, make_rollout
from vrt_jax.train.grpo_step import make_grpo_step
from vrt_jax.train.optim import make_optimizer
from vrt_jax.types import VisualFeatures

ROWS = 8


def update_batch(inputs: object, out: Rollout, mesh: Mesh) -> GrpoBatch:
  """The rollout with advantages and best samples that are the same on every mesh."""
  random = case.random_batch(ROWS)
  rows = batch_sharding(mesh)
  fields = ("advantages", "credit", "best", "best_valid", "answer_mask")
  return GrpoBatch(
    prompts=inputs.text,
    rope_deltas=inputs.rope_deltas,
    visual=out.visual,
    image=out.image,
    completions=out.completions,
    best_is_answer=place(np.ones_like(random.best_is_answer), rows),
    **{name: place(getattr(random, name), rows) for name in fields},
  )


def of_pictures(visual: VisualFeatures, patch_segments: Array) -> VisualFeatures:
  """Zeros where slots are padding, which hold anything."""
  merged = patch_segments.shape[1] // visual.tokens.shape[1]
  valid = patch_segments[:, ::merged, None] > 0
  return VisualFeatures(
    tokens=jnp.where(valid, visual.tokens, 0),
    deepstack=jnp.where(valid[:, None], visual.deepstack, 0),
  )


def one_run(name: str) -> dict[str, np.ndarray]:
  """A run by its name."""
  if name != "tpu":
    return run(name)
  with tpu_forms() as kernels:
    found = run("2x2x2")
  assert len(kernels) >= 4  # prompts, packed completions, vision tower, Hiera
  return found


def run(name: str) -> dict[str, np.ndarray]:
  """One rollout and one update on the mesh of that name."""
  mesh = mesh_of(MESHES[name])
  state, frozen = case.state(mesh=mesh, config=tiny.odd_vocabulary(case.MODEL))
  placement = [x.sharding for x in jax.tree.leaves(state)]
  key = replicate(jax.random.key(5), mesh)
  inputs = put_whole_batch(case.inputs(ROWS), mesh)
  rollout = make_rollout(case.GRPO, case.few_ids(), mesh.abstract_mesh)
  out = rollout(state.trainable, frozen, inputs, key)
  for x in jax.tree.leaves(out):  # rows stay where they are, so the update moves nothing
    assert x.sharding.shard_shape(x.shape)[0] == ROWS // (mesh.shape["data"] * mesh.shape["fsdp"])
  step = make_grpo_step(
    make_optimizer(case.OPTIM), case.OPTIM, case.GRPO, SftLossConfig(num_points=64), state
  )
  state, metrics = step(state, frozen, update_batch(inputs, out, mesh), key)
  assert rollout._cache_size() == step._cache_size() == 1
  assert [x.sharding for x in jax.tree.leaves(state)] == placement
  named = {
    "rollout": out.replace(visual=of_pictures(out.visual, inputs.vision.patch_segments)),
    "metrics": metrics,
    "trainable": state.trainable,
    "moments": state.opt_state,
  }
  flat = jax.tree_util.tree_flatten_with_path(named)[0]
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


def main() -> None:
  """The runs of the command line."""
  jax.config.update("jax_num_cpu_devices", 8)
  found = {name: one_run(name) for name in sys.argv[2:]}
  np.savez(sys.argv[1], **{f"{r}/{k}": v for r, values in found.items() for k, v in values.items()})


if __name__ == "__main__":
  main()
