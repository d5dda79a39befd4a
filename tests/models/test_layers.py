"""Rows in blocks, as CPUs compute wide layers, and rows of a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vrt_jax.models import layers
from vrt_jax.models.layers import Embedding, in_row_blocks


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


def embedding(dtype: str) -> Embedding:
  """A random table of 300 rows."""
  graphdef, params = nnx.split(Embedding(300, 8, axes=(None, None), rngs=nnx.Rngs(0)))
  return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_table_and_their_slope(dtype):
  table = embedding(dtype)
  ids = jnp.asarray([[7, 299], [0, 7]])
  rows = table(ids)
  assert (rows.dtype, rows.shape) == (jnp.dtype(dtype), (2, 2, 8))
  np.testing.assert_array_equal(rows, np.asarray(table.weight[...])[np.asarray(ids)])
  factors = jnp.arange(32, dtype=dtype).reshape(2, 2, 8)
  slope = nnx.grad(lambda table: jnp.sum(table(ids) * factors))(table).weight[...]
  expected = np.zeros((300, 8))
  np.add.at(expected, np.asarray(ids), np.asarray(factors, np.float64))
  np.testing.assert_array_equal(np.asarray(slope, np.float64), expected)


def test_a_loop_over_tokens_neither_widens_nor_copies_a_table_of_16_bits():
  table = embedding("bfloat16")
  graphdef, params = nnx.split(table)

  @jax.jit
  def total(params, ids):
    def add(_, carry):
      ids, total = carry
      rows = nnx.merge(graphdef, params)(ids).astype(jnp.float32)
      return ids + 1, total + rows * jax.lax.rsqrt(jnp.mean(rows * rows))

    return jax.lax.fori_loop(0, 10, add, (ids, jnp.zeros((2, 8))))[1]

  program = total.lower(params, jnp.asarray([3, 5])).compile()
  assert program.memory_analysis().temp_size_in_bytes < table.weight[...].nbytes
