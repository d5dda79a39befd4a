"""Caches of keys and values on a mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from tests import tiny
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache
from vrt_jax.ops.sharding import on_mesh

ROWS = 8


def group_cache() -> GroupCache:
  prompt = KVCache.zeros(tiny.MODEL.text, ROWS, 16, jnp.float32)
  return GroupCache.start(prompt, jnp.ones((ROWS, 16), bool), 2, 4)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 4, 2)])
def test_no_device_holds_the_cache_of_all_rows(sizes):
  with on_mesh(AbstractMesh(sizes, ("data", "fsdp", "tensor"))):
    jaxpr = jax.make_jaxpr(group_cache)()
  specs = [
    (e.outvars[0].aval.ndim, e.params["sharding"].spec[1])
    for e in jaxpr.eqns
    if e.primitive.name == "sharding_constraint"
  ]
  assert sorted(rank for rank, _ in specs) == [5, 5, 6]  # the prompts' k and v, the new tokens'
  assert all(axes == ("data", "fsdp") for _, axes in specs)


def test_without_a_mesh_nothing_is_constrained():
  assert "sharding_constraint" not in str(jax.make_jaxpr(group_cache)())
