"""Which samples a resize without interpolation reads."""

import numpy as np
from jaxtyping import Int

from vrt_jax.config import NearestMode


def nearest_source(
  in_size: int, out_size: int, mode: NearestMode = "nearest"
) -> Int[np.ndarray, "out_size"]:
  """The input sample that each output sample reads in `F.interpolate(mode=mode)`.

  Sample i reads floor(i * in / out), the first pixel of its cell, where the mode is "nearest", and
  floor((i + 1/2) * in / out), the middle one, where it is "nearest-exact".

  >>> nearest_source(6, 3).tolist(), nearest_source(6, 3, "nearest-exact").tolist()
  ([0, 2, 4], [1, 3, 5])
  """
  return (2 * np.arange(out_size) + (mode == "nearest-exact")) * in_size // (2 * out_size)
