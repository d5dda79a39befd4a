"""Indices of nearest resizing against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vrt_jax.ops.nearest import nearest_source


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(("in_size", "out_size"), [(6, 3), (1500, 256), (17, 64), (5, 5), (1, 4)])
def test_indices_equal_torch(in_size, out_size, mode):
  ramp = torch.arange(in_size, dtype=torch.float32)[None, None]
  expected = F.interpolate(ramp, out_size, mode=mode)[0, 0].numpy()
  np.testing.assert_array_equal(nearest_source(in_size, out_size, mode), expected)


def test_the_modes_differ():
  assert nearest_source(6, 3).tolist() == [0, 2, 4]
  assert nearest_source(6, 3, "nearest-exact").tolist() == [1, 3, 5]
