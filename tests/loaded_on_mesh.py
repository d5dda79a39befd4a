"""What devices of meshes of four hold once a model directory is read, written to a file.

    python -m tests.loaded_on_mesh OUT.json

For each mesh bytes by device: of the model (`read`), of it and the state of a run that begins with
it (`with_state`), of the model where no mesh is given (`alone`); what the model's parts are by
`param_shardings` (`part`), and whether the values are the same (`same`).
"""

import gc
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tests import tiny
from tests.four_devices import write_found
from vrt_jax import model_directory
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.placement import param_shardings
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.setup import base_model, with_adapters
from vrt_jax.train.state import create_state

BASE = Path(sys.argv[1]).with_suffix("")
CONFIG = tiny.train_config(base=str(BASE))


def held() -> list[int]:
  """Bytes in use on each device."""
  gc.collect()
  buffers = {
    (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
    for array in jax.live_arrays()
    for shard in array.addressable_shards
  }
  totals = [0] * jax.device_count()
  for (device, _), size in buffers.items():
    totals[device] += size
  return totals


def part_of(model: Sa2VA, mesh: Mesh) -> int:
  """Bytes of a model's parameters that a device has."""
  state = nnx.state(model)
  shardings = jax.tree.leaves(param_shardings(state, mesh))
  return sum(
    int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize
    for s, x in zip(shardings, jax.tree.leaves(state), strict=True)
  )


def measure(mesh: Mesh) -> dict:
  if not BASE.exists():
    given = tiny.loaded()
    model_directory.save(BASE, given.model, given.tokenizer, given.image)
    del given
    tiny.loaded.cache_clear()
  before = np.asarray(held())

  def more() -> list[int]:
    return (held() - before).tolist()

  whole = model_directory.load(str(BASE)).model
  found: dict = {"alone": more()}
  values = [np.array(x) for x in jax.tree.leaves(nnx.state(whole))]
  del whole
  loaded = base_model(CONFIG, mesh)
  found |= {"read": more(), "part": part_of(loaded.model, mesh)}
  trainable = trainable_filter(CONFIG.optim.trainable)
  run = create_state(
    with_adapters(loaded, CONFIG).model, make_optimizer(CONFIG.optim), trainable, mesh
  )
  found["with_state"] = more()
  del run
  read = jax.tree.leaves(nnx.state(loaded.model))
  found["same"] = all(map(np.array_equal, values, read))
  return found


if __name__ == "__main__":
  write_found(measure)
