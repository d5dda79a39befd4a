"""Prefill and decode under jit: one compiled program for a bucket of prompts.

Prompts are right-padded to Tp slots of the cache; every row writes its i-th new token to slot
Tp + i. Padding slots are never looked at. At a [SEG] that is an input token, in the prompt or
among the new tokens, the hidden state before the final norm is kept; a [SEG] that comes out last
has none.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh
from jaxtyping import Bool, Float, Int32, Key

from vrt_jax.generate.sampling import Sampling, sample
from vrt_jax.models.qwen3_vl.text import KVCache
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.ops.attention import AttentionMask
from vrt_jax.ops.sharding import on_mesh
from vrt_jax.types import TextInputs, VisionInputs


@flax.struct.dataclass
class GenerationInputs:
  """A padded batch of prompts."""

  text: TextInputs
  vision: VisionInputs
  rope_deltas: Int32[Array, "B"]
  """Position of the first new token minus the prompt's length."""
  grounding_image: Array
  """[B, Y, X, 3] uint8."""


@flax.struct.dataclass
class Generation:
  """New tokens and the masks of all [SEG] that were inputs."""

  tokens: Int32[Array, "B N"]
  """Generated ids; positions after the end token hold the pad id."""
  lengths: Int32[Array, "B"]
  """Number of generated ids, the end token included."""
  num_segs: Int32[Array, "B"]
  """[SEG] with a hidden state, prompt included; those beyond M have no mask."""
  low_res_masks: Float[Array, "B M Y X"]
  iou_pred: Float[Array, "B M"]


@flax.struct.dataclass
class TokenIds:
  """The ids that decoding treats specially."""

  seg: int = flax.struct.field(pytree_node=False)
  end: int = flax.struct.field(pytree_node=False)
  pad: int = flax.struct.field(pytree_node=False)
  forbidden: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class DecodeState:
  """What the decode loop carries."""

  step: Int32[Array, ""]
  cache: KVCache
  kv_segments: Int32[Array, "B S"]
  next_token: Int32[Array, "B"]
  tokens: Int32[Array, "B N"]
  done: Bool[Array, "B"]
  seg_hidden: Float[Array, "B M D"]
  num_segs: Int32[Array, "B"]
  key: Key[Array, ""]


def store_seg_states(
  buffer: Float[Array, "B M D"],
  num_segs: Int32[Array, "B"],
  hidden: Float[Array, "B T D"],
  is_seg: Bool[Array, "B T"],
) -> tuple[Float[Array, "B M D"], Int32[Array, "B"]]:
  """Appends the hidden states at [SEG] positions to each row's buffer; overflow is dropped."""
  rank = num_segs[:, None] + jnp.cumsum(is_seg, axis=1) - 1
  slot = jnp.where(is_seg, rank, buffer.shape[1])
  rows = jnp.arange(buffer.shape[0])[:, None]
  return buffer.at[rows, slot].set(hidden, mode="drop"), num_segs + jnp.sum(is_seg, axis=1)


def prefill(
  model: Sa2VA, inputs: GenerationInputs, max_new_tokens: int, max_masks: int, ids: TokenIds
) -> tuple[DecodeState, Float[Array, "B V"]]:
  """Runs the prompts; gives the decode state without a first token, and the last logits."""
  text = inputs.text
  b, t = text.input_ids.shape
  language = model.qwen.language_model
  embeds, deepstack = model.qwen.embed_multimodal(text, inputs.vision, model.dtype)
  cache = KVCache.zeros(model.config.text, b, t + max_new_tokens, model.dtype)
  segments = text.token_mask.astype(jnp.int32)
  kv_segments = jnp.pad(segments, ((0, 0), (0, max_new_tokens)))
  mask = AttentionMask.causal(segments, kv_segments)
  hidden, cache = language.hidden_states(
    embeds, text.position_ids, mask, deepstack, text.visual_index, cache, 0
  )
  lengths = jnp.sum(segments, axis=1)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
  empty = jnp.zeros((b, max_masks, hidden.shape[-1]), hidden.dtype)
  is_seg = (text.input_ids == ids.seg) & text.token_mask
  seg_hidden, num_segs = store_seg_states(empty, jnp.zeros(b, jnp.int32), hidden, is_seg)
  state = DecodeState(
    step=jnp.zeros((), jnp.int32),
    cache=cache,
    kv_segments=kv_segments,
    next_token=jnp.zeros(b, jnp.int32),
    tokens=jnp.full((b, max_new_tokens), ids.pad, jnp.int32),
    done=jnp.zeros(b, bool),
    seg_hidden=seg_hidden,
    num_segs=num_segs,
    key=jax.random.key(0),
  )
  return state, language.logits(last)


def decode_step(
  model: Sa2VA, state: DecodeState, prompt_slots: int, first_positions: Array, ids: TokenIds
) -> tuple[DecodeState, Float[Array, "B V"]]:
  """Feeds `next_token` of every row and gives the logits of the token after it."""
  language = model.qwen.language_model
  slot = prompt_slots + state.step
  live = ~state.done
  kv_segments = state.kv_segments.at[:, slot].set(1)
  b = state.next_token.shape[0]
  positions = jnp.broadcast_to((first_positions + state.step)[None, :, None], (3, b, 1))
  hidden, cache = language.hidden_states(
    language.embed(state.next_token[:, None]).astype(model.dtype),
    positions,
    AttentionMask(jnp.ones((b, 1), jnp.int32), kv_segments, slot[None]),
    cache=state.cache,
    cache_slot=slot,
  )
  is_seg = ((state.next_token == ids.seg) & live)[:, None]
  seg_hidden, num_segs = store_seg_states(state.seg_hidden, state.num_segs, hidden, is_seg)
  state = state.replace(
    step=state.step + 1,
    cache=cache,
    kv_segments=kv_segments,
    seg_hidden=seg_hidden,
    num_segs=num_segs,
  )
  return state, language.logits(hidden[:, 0])


@partial(jax.jit, static_argnames=("max_new_tokens", "max_masks", "sampling", "ids", "mesh"))
def generate(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  inputs: GenerationInputs,
  key: Key[Array, ""],
  *,
  max_new_tokens: int,
  max_masks: int,
  sampling: Sampling,
  ids: TokenIds,
  mesh: AbstractMesh | None = None,
) -> Generation:
  """Text and low-resolution mask logits for a batch of prompts, in one program.

  `mesh` is the one over which parameters and inputs are divided.
  """
  model = nnx.merge(graphdef, params)
  with on_mesh(mesh):
    return _generate(model, inputs, key, max_new_tokens, max_masks, sampling, ids)


def _generate(
  model: Sa2VA,
  inputs: GenerationInputs,
  key: Key[Array, ""],
  max_new_tokens: int,
  max_masks: int,
  sampling: Sampling,
  ids: TokenIds,
) -> Generation:
  vocab = model.config.text.vocab_size
  forbidden = jnp.zeros(vocab, bool).at[jnp.asarray(ids.forbidden)].set(True)
  prompt_slots = inputs.text.input_ids.shape[1]
  first_positions = jnp.sum(inputs.text.token_mask, axis=1) + inputs.rope_deltas

  def choose(state: DecodeState, logits: Array) -> DecodeState:
    """Appends the chosen token of every row that is not done."""
    next_key, sample_key = jax.random.split(state.key)
    token = sample(sample_key, logits, sampling, forbidden)
    token = jnp.where(state.done, ids.pad, token)
    return state.replace(
      key=next_key,
      next_token=token,
      tokens=state.tokens.at[:, state.step].set(token),
      done=state.done | (token == ids.end),
    )

  def body(state: DecodeState) -> DecodeState:
    return choose(*decode_step(model, state, prompt_slots, first_positions, ids))

  state, logits = prefill(model, inputs, max_new_tokens, max_masks, ids)
  state = choose(state.replace(key=key), logits)
  state = jax.lax.while_loop(
    lambda s: (s.step < max_new_tokens - 1) & ~jnp.all(s.done), body, state
  )
  masks = model.masks(inputs.grounding_image, state.seg_hidden)
  ended = jnp.cumsum(state.tokens == ids.end, axis=1)
  written = jnp.arange(max_new_tokens)[None] <= state.step
  lengths = jnp.sum(written & ((ended == 0) | (state.tokens == ids.end) & (ended == 1)), axis=1)
  return Generation(
    tokens=state.tokens,
    lengths=lengths,
    num_segs=state.num_segs,
    low_res_masks=masks.low_res_masks,
    iou_pred=masks.iou_pred,
  )
