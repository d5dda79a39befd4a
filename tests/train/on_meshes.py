"""One training step of the tiny model on several meshes of eight CPU devices, written to files.

    python -m tests.train.on_meshes OUT.npz one 2x2x2 halves

Arrays are named `<run>/<what>`: every loss part, and the state after the step. AdamW's first
moment is (1 - b1) times the gradient, so gradients are in it. The runs are the meshes, two that
differ in accumulation alone ("text1", "text8": without mask losses, whose points are drawn anew in
every part), "tpu", which is "2x2x2" as programs are for TPUs, and a control: "halves" is the mean
of the losses of half batches, each divided by its own tokens.
"""

import dataclasses
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tests import tiny
from tests.tpu_forms import tpu_forms
from vrt_jax.config import MeshConfig, SftLossConfig
from vrt_jax.placement import put_batch, replicate
from vrt_jax.runtime import MESH_AXES, make_mesh
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.sft_step import make_sft_step
from vrt_jax.train.state import create_state
from vrt_jax.types import Batch

SIZE = 8
MESHES = {
  "one": None,
  "8x1x1": (8, 1, 1),
  "1x8x1": (1, 8, 1),
  "1x1x8": (1, 1, 8),
  "2x2x2": (2, 2, 2),
}
BASE = tiny.train_config()
OPTIM = dataclasses.replace(BASE.optim, batch_size=SIZE, warmup_start_factor=1.0, clip_norm=1e9)
TEXT_ALONE = SftLossConfig(bce_weight=0.0, dice_weight=0.0, num_points=16)


def mesh_of(sizes: tuple[int, int, int] | None) -> Mesh:
  """A mesh of all devices, or of one for None."""
  if sizes is None:
    one = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(one, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  return make_mesh(MeshConfig(*sizes))


def step(
  sizes: tuple[int, int, int] | None,
  batch: Batch,
  parts: int = 1,
  loss: SftLossConfig = BASE.sft,
) -> dict[str, np.ndarray]:
  """One step: loss parts and the new state."""
  mesh = mesh_of(sizes)
  optim = dataclasses.replace(OPTIM, accumulation_steps=parts)
  optimizer = make_optimizer(optim)
  model = tiny.random_model(tiny.odd_vocabulary(BASE.model))
  state, frozen = create_state(model, optimizer, trainable_filter(optim.trainable), mesh)
  placement = [x.sharding for x in jax.tree.leaves(state)]
  run = make_sft_step(optimizer, optim, loss, state)
  key = replicate(jax.random.key(0), mesh)
  state, metrics = run(state, frozen, put_batch(batch, mesh), key)
  assert run._cache_size() == 1
  assert [x.sharding for x in jax.tree.leaves(state)] == placement
  named = {"metrics": metrics, "trainable": state.trainable, "moments": state.opt_state}
  flat = jax.tree_util.tree_flatten_with_path(named)[0]
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


def half(batch: Batch, start: int) -> Batch:
  """Every other row."""
  rows = slice(start, None, 2)
  position_ids = batch.text.position_ids[:, rows]
  rest = jax.tree.map(lambda x: x[rows], batch)
  return rest.replace(text=rest.text.replace(position_ids=position_ids))


def one_run(name: str, batch: Batch) -> dict[str, np.ndarray]:
  """A run by its name."""
  if name in MESHES:
    return step(MESHES[name], batch)
  if name == "tpu":
    with tpu_forms() as kernels:
      found = step(MESHES["2x2x2"], batch)
    assert len(kernels) >= 3  # text, vision tower, Hiera
    return found
  if name.startswith("text"):
    return step(None, batch, parts=int(name.removeprefix("text")), loss=TEXT_ALONE)
  halves = [step(None, half(batch, start)) for start in range(2)]
  return {k: np.mean([h[k] for h in halves], axis=0) for k in halves[0]}


def main() -> None:
  """The runs of the command line."""
  jax.config.update("jax_num_cpu_devices", 8)
  batch = tiny.batch(SIZE, BASE)
  found = {name: one_run(name, batch) for name in sys.argv[2:]}
  np.savez(sys.argv[1], **{f"{r}/{k}": v for r, values in found.items() for k, v in values.items()})


if __name__ == "__main__":
  main()
