"""Rows in blocks, as CPUs compute wide layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.models import layers
from vrt_jax.models.layers import in_row_blocks


def rows_of(x: jax.Array) -> jax.Array:
  return jnp.concatenate([jnp.sin(x), jnp.sum(x, axis=-1, keepdims=True)], axis=-1)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 9, 5), (1, 7, 5)])  # blocks; a rest; too few rows
def test_blocks_of_rows_give_what_all_rows_give(monkeypatch, shape):
  sizes = []

  def counted(x):
    sizes.append(x.shape[:-1])
    return rows_of(x)

  monkeypatch.setattr(layers, "ROW_BLOCK", 4)
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  np.testing.assert_array_equal(in_row_blocks(counted, x), rows_of(x))
  expected = {(3, 4, 5): [(4,)], (2, 9, 5): [(4,), (2,)], (1, 7, 5): [(1, 7)]}
  assert sizes == expected[shape]


def test_other_platforms_take_all_rows(monkeypatch):
  sizes = []
  monkeypatch.setattr(layers, "ROW_BLOCK", 4)
  monkeypatch.setattr(layers, "on_one_cpu", lambda: False)
  in_row_blocks(lambda x: sizes.append(x.shape) or x, jnp.ones((3, 4, 5)))
  assert sizes == [(3, 4, 5)]
