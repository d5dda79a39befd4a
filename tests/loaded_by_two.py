"""One of two processes that read a model directory onto a mesh of both, two devices each.

    python -m tests.loaded_by_two MODEL OUT.json

Writes the bytes of the model on its own devices, and whether its values are those that one device
reads.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from vrt_jax import model_directory
from vrt_jax.config import MeshConfig
from vrt_jax.placement import fetch
from vrt_jax.runtime import make_mesh, start_processes


def main() -> None:
  model, out = sys.argv[1:]
  start_processes()
  jax.config.update("jax_num_cpu_devices", 2)
  divided = nnx.state(model_directory.load(model, mesh=make_mesh(MeshConfig(1, 4, 1))).model)
  sizes = dict.fromkeys(map(str, jax.local_devices()), 0)
  for array in jax.tree.leaves(divided):
    for shard in array.addressable_shards:
      sizes[str(shard.device)] += shard.data.nbytes
  whole = nnx.state(model_directory.load(model).model)
  same = jax.tree.map(np.array_equal, jax.device_get(whole), fetch(divided))
  found = {"bytes": list(sizes.values()), "same": all(jax.tree.leaves(same))}
  Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
  main()
