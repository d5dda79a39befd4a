"""Groups that give way to others, and the choice of those that an update sees."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.rl import group_case
from vrt_jax.config import MeshConfig
from vrt_jax.rl.regroup import (
  equal_groups,
  join_groups,
  joined_rewards,
  most_varied,
  refill_source,
  take_groups,
)
from vrt_jax.runtime import batch_shardings, make_mesh, place


def test_refills_replace_equal_groups_in_order():
  kept = np.array([[1, 1], [0, 1], [0, 0], [2, 2]], np.float32)
  fresh = np.array([[1, 0], [1, 1], [3, 1], [1, 1]], np.float32)
  source = refill_source(kept, fresh)
  assert source.tolist() == [0, -1, 2, -1]
  joined = joined_rewards(kept, source, fresh)
  assert joined.tolist() == [[1, 0], [0, 1], [3, 1], [2, 2]]
  assert equal_groups(joined).tolist() == [False, False, False, True]


def test_joined_batches_have_the_chosen_rows_of_every_array():
  mesh = make_mesh(MeshConfig())
  first = group_case.random_batch()
  second = jax.tree.map(lambda x: x[::-1] if x.dtype == bool else x + 1, first)
  source = np.array([2, -1, 0, -1], np.int32)
  shardings = batch_shardings(first, mesh)
  kept, fresh = (place(jax.tree.map(jnp.asarray, b), shardings) for b in (first, second))
  joined = join_groups(kept, source, fresh, mesh=mesh)

  def expected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    axis = int(a.ndim == 3 and a.shape[0] == 3 and a.shape[1] == 4)  # position_ids
    a, b = np.moveaxis(np.asarray(a), axis, 0), np.moveaxis(np.asarray(b), axis, 0)
    rows = np.stack([b[2], a[1], b[0], a[3]])
    return np.moveaxis(rows, 0, axis)

  jax.tree.map(
    lambda got, a, b: np.testing.assert_array_equal(got, expected(a, b)), joined, first, second
  )
  same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), joined, shardings)
  assert all(jax.tree.leaves(same))


def test_the_groups_that_vary_most_in_their_order():
  rewards = np.array([[1, 1, 1], [0, 1, 0], [0, 3, 0], [0, 0, 1], [5, 5, 5]], np.float32)
  assert most_varied(rewards, 1).tolist() == [2]
  assert most_varied(rewards, 2).tolist() == [1, 2]  # of equal ones the first
  assert most_varied(rewards, 4).tolist() == [0, 1, 2, 3]


def test_taken_batches_have_the_rows_of_every_array():
  mesh = make_mesh(MeshConfig())
  whole = group_case.random_batch()
  batch = place(jax.tree.map(jnp.asarray, whole), batch_shardings(whole, mesh))
  taken = take_groups(batch, np.array([1, 3], np.int32), mesh=mesh)

  def expected(x: np.ndarray) -> np.ndarray:
    axis = int(x.ndim == 3 and x.shape[0] == 3 and x.shape[1] == 4)  # position_ids
    return np.take(x, [1, 3], axis=axis)

  jax.tree.map(lambda got, x: np.testing.assert_array_equal(got, expected(x)), taken, whole)
