"""The programs of training and generation lower for GPUs and TPUs, which takes neither of them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

from tests import tiny
from vrt_jax.config import MeshConfig
from vrt_jax.generate.decode import DecodeState, GenerationInputs, TokenIds, decode, prefill
from vrt_jax.generate.sampling import Sampling
from vrt_jax.models.sa2va import abstract_sa2va
from vrt_jax.runtime import make_mesh
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.sft_step import make_sft_step
from vrt_jax.train.state import create_state

CONFIG = tiny.train_config()
PLATFORMS = ("cuda", "tpu")
NEW_TOKENS, MASKS = 8, 3
IDS = TokenIds(seg=5, end=6, pad=0, forbidden=(1,))


def shapes(tree: object) -> object:
  """Arrays -> their shapes and dtypes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lowered(function, *args: object) -> export.Exported:
  """The exported program, with text for both platforms."""
  found = export.export(jax.jit(function), platforms=PLATFORMS)(*args)
  assert found.platforms == PLATFORMS
  return found


def prompts() -> GenerationInputs:
  batch = tiny.batch()
  deltas = jnp.zeros(2, jnp.int32)
  return shapes(GenerationInputs(batch.text, batch.vision, deltas, batch.grounding_image))


@pytest.fixture(scope="module")
def model() -> tuple[nnx.GraphDef, nnx.State]:
  return nnx.split(abstract_sa2va(tiny.MODEL))


def run_prefill(graphdef: nnx.GraphDef, params: nnx.State, inputs: GenerationInputs):
  return prefill(nnx.merge(graphdef, params), inputs, NEW_TOKENS, MASKS, IDS)


def test_sft_step():
  optimizer = make_optimizer(CONFIG.optim)
  state, frozen = create_state(
    tiny.random_model(CONFIG.model),
    optimizer,
    trainable_filter("adapters"),
    make_mesh(MeshConfig()),
  )
  step = make_sft_step(optimizer, CONFIG.optim, CONFIG.sft, state)
  key = shapes(jax.random.key(0))
  args = shapes((state, frozen, tiny.batch()))
  found = export.export(step, platforms=PLATFORMS)(*args, key)
  assert found.platforms == PLATFORMS
  assert len(found.out_avals) > len(jax.tree.leaves(state))


def test_prefill_and_decode(model: tuple[nnx.GraphDef, nnx.State]):
  graphdef, params = model
  first = functools.partial(run_prefill, graphdef)
  assert lowered(first, shapes(params), prompts()).out_avals
  state, logits = jax.eval_shape(first, params, prompts())
  assert logits.shape == (2, tiny.VOCAB_SIZE)

  def all_tokens(params: nnx.State, state: DecodeState, logits: jax.Array):
    return decode(nnx.merge(graphdef, params), state, logits, Sampling(), IDS).tokens

  found = lowered(all_tokens, shapes(params), shapes(state), shapes(logits))
  assert found.out_avals[-1].shape == (2, 1, NEW_TOKENS)
