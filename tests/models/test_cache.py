"""Caches of keys and values: on a mesh, and in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from tests import tiny
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache
from vrt_jax.ops.sharding import on_mesh

ROWS = 8


def group_cache(dtype: DTypeLike = jnp.float32) -> GroupCache:
  prompt = KVCache.zeros(tiny.MODEL.text, ROWS, 16, dtype)
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


@pytest.mark.parametrize("for_cpus", [True, False])
def test_only_a_layers_own_cache_is_written_without_a_conversion_of_all_of_it(for_cpus):
  """The compiler converts the whole of an array of 16 bits to write a slot."""
  whole = group_cache(jnp.bfloat16)
  cache = whole.for_cpus()[0] if for_cpus else whole
  heads, width = tiny.MODEL.text.num_kv_heads, tiny.MODEL.text.head_dim
  new = jnp.ones((ROWS, 2, heads, width), jnp.bfloat16)
  compiled = jax.jit(type(cache).write).lower(cache, 0, 1, new, new).compile().as_text()
  shape = ",".join(map(str, cache.k.shape))
  assert f"f32[{shape}]" in compiled
  assert (f"bf16[{shape}]" in compiled) != for_cpus


@pytest.mark.parametrize("form", ["for_cpus", "by_layer"])
def test_a_layers_own_cache_gives_the_same_attention_in_16_bits(form):
  rng = np.random.default_rng(0)
  text = tiny.MODEL.text

  def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

  whole = group_cache(jnp.bfloat16)
  whole = whole.replace(
    prompt=KVCache(drawn(*whole.prompt.k.shape), drawn(*whole.prompt.v.shape)),
    k=drawn(*whole.k.shape),
    v=drawn(*whole.v.shape),
  )
  new = [drawn(ROWS, 2, text.num_kv_heads, text.head_dim) for _ in range(2)]
  q = drawn(ROWS, 2, text.num_heads, text.head_dim)
  for layer, own in enumerate(getattr(whole, form)()):
    out = own.write(0, 2, *new).attend(0, 2, q)
    expected = whole.write(layer, 2, *new).attend(layer, 2, q)
    assert out.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      out.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.01, atol=0.01
    )
    wrong = own.write(0, 1, *new).attend(0, 2, q)
    assert np.abs(np.asarray(wrong - expected, np.float32)).max() > 0.1


def test_slots_that_are_not_written_yet_need_not_be_read():
  rng = np.random.default_rng(0)
  whole = group_cache()
  whole = whole.replace(
    **{name: jnp.asarray(rng.normal(size=whole.k.shape)) for name in ("k", "v")}
  )
  heads, width = tiny.MODEL.text.num_heads, tiny.MODEL.text.head_dim
  q = jnp.asarray(rng.normal(size=(ROWS, 2, heads, width)), jnp.float32)
  expected, read = (cache.attend(1, 2, q) for cache in (whole, whole.replace(slots_read=3)))
  np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-6)
  assert jnp.abs(whole.replace(slots_read=2).attend(1, 2, q) - expected).max() > 0.01
  program = str(jax.make_jaxpr(whole.replace(slots_read=3).attend)(1, 2, q))
  assert f"slice_sizes=(1, {ROWS}, 2, 3, " in program
