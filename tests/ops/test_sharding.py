"""Where rows go on a mesh: those of a head of any size, and those that every device works on."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from tests import tiny
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache
from vrt_jax.models.qwen3_vl.text import TextDecoder
from vrt_jax.ops.sharding import on_mesh, rows_by_every_device, rows_by_tensor
from vrt_jax.runtime import MESH_AXES


def placed(function, x: jax.Array, sizes: tuple[int, int, int]) -> tuple[tuple, PartitionSpec]:
  """The result's shape and where `function` puts it on a mesh."""
  with on_mesh(AbstractMesh(sizes, MESH_AXES)):
    jaxpr = jax.make_jaxpr(function)(x)
  (spec,) = [
    e.params["sharding"].spec for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"
  ]
  return jaxpr.out_avals[0].shape, spec


@pytest.mark.parametrize("rows, padded", [(16, 16), (17, 20)])
def test_rows_of_any_number_are_divided(rows: int, padded: int):
  x = jnp.ones((rows, 6))
  assert placed(rows_by_tensor, x, (1, 2, 4)) == ((padded, 6), PartitionSpec("tensor"))
  with on_mesh(AbstractMesh((1, 8, 1), MESH_AXES)):
    assert jax.eval_shape(rows_by_tensor, x).shape == x.shape
  assert rows_by_tensor(x) is x


@pytest.mark.parametrize(
  "rows, axes", [(16, ("data", "fsdp", "tensor")), (4, ("data", "fsdp")), (3, None)]
)
def test_every_device_has_rows_where_there_are_enough(rows: int, axes: tuple[str, ...] | None):
  x = jnp.ones((rows, 6))
  assert placed(rows_by_every_device, x, (2, 2, 2))[1][0] == axes
  assert rows_by_every_device(x) is x


def test_a_vocabulary_of_any_size_is_divided_in_decoding():
  config = tiny.odd_vocabulary(tiny.MODEL).text
  decoder = nnx.eval_shape(lambda: TextDecoder(config, tiny.LORA, nnx.Rngs(0)))
  graphdef, state = nnx.split(decoder)

  def decoding(state: nnx.State) -> tuple[jax.Array, jax.Array]:
    prompt = KVCache.zeros(config, 2, 4, jnp.float32)
    cache = GroupCache.start(prompt, jnp.ones((2, 4), bool), 2, 4)
    copy, _ = nnx.merge(graphdef, state).for_decoding(cache)
    return copy.head_weight(), copy.logits(jnp.ones((2, 2, config.hidden_size)))

  with on_mesh(AbstractMesh((1, 1, 2), MESH_AXES)):
    head, logits = jax.eval_shape(decoding, state)
  assert head.shape[0] == config.vocab_size + 1
  assert logits.shape == (2, 2, config.vocab_size)
