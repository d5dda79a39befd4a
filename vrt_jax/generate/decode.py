"""Prefill and decode: from a bucket of prompts to new tokens, under jit.

Prompts are right-padded to P slots of a cache that is read only; every sample writes its i-th new
token to slot i of its own cache. A prompt has one sample (`vrt_jax.generate.generation`) or several
(`vrt_jax.rl.rollout`). Padding slots are never looked at. At a [SEG] that is an input token, in the
prompt or among the new tokens, the hidden state before the final norm is kept; a [SEG] that comes
out last has none.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, Key

from vrt_jax.generate.sampling import Sampling, logp_and_entropy, sample
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache
from vrt_jax.models.qwen3_vl.text import DecodingCache, TextDecoder
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.sharding import constrain_batch, on_tpu, rows_by_every_device
from vrt_jax.types import TextInputs, VisionInputs, VisualFeatures

STAGES = 4
MIN_STAGED = 512
"""New tokens from which on TPUs decode in stages."""


class GenerationInputs(flax.struct.PyTreeNode):
  """A padded batch of prompts."""

  text: TextInputs
  vision: VisionInputs
  rope_deltas: Int32[Array, "B"]
  """Position of the first new token minus the prompt's length."""
  grounding_image: Array
  """[B, Y, X, 3] uint8."""


class TokenIds(flax.struct.PyTreeNode):
  """The ids that decoding treats specially."""

  seg: int = flax.struct.field(pytree_node=False)
  end: int = flax.struct.field(pytree_node=False)
  pad: int = flax.struct.field(pytree_node=False)
  forbidden: tuple[int, ...] = flax.struct.field(pytree_node=False)


class TokenStats(flax.struct.PyTreeNode):
  """Of the tokens so far, under the model at `temperature` over the whole vocabulary."""

  logps: Float[Array, "B G N"]
  entropy: Float[Array, "B G"]
  """Sum over the tokens."""
  temperature: float = flax.struct.field(pytree_node=False, default=1.0)


class DecodeState(flax.struct.PyTreeNode):
  """What the decode loop carries for G samples of each of B prompts."""

  step: Int32[Array, ""]
  cache: DecodingCache
  first_positions: Int32[Array, "B"]
  """Position of the first new token."""
  keys: Key[Array, "B G"]
  next_token: Int32[Array, "B G"]
  tokens: Int32[Array, "B G N"]
  done: Bool[Array, "B G"]
  seg_hidden: Float[Array, "B G M D"]
  num_segs: Int32[Array, "B G"]
  stats: TokenStats | None
  """None where they are not recorded."""


def store_seg_states(
  buffer: Float[Array, "B M D"],
  num_segs: Int32[Array, "B"],
  hidden: Float[Array, "B T D"],
  is_seg: Bool[Array, "B T"],
) -> tuple[Float[Array, "B M D"], Int32[Array, "B"]]:
  """Appends the hidden states at [SEG] positions to each row's buffer; overflow is dropped."""
  rank = num_segs[:, None] + jnp.cumsum(is_seg, axis=1) - 1
  slot = jnp.where(is_seg, rank, buffer.shape[1])
  buffer = jax.vmap(lambda row, slot, new: row.at[slot].set(new, mode="drop"))(buffer, slot, hidden)
  return buffer, num_segs + jnp.sum(is_seg, axis=1)


def read_prompts(
  model: Sa2VA, text: TextInputs, visual: VisualFeatures
) -> tuple[KVCache, Float[Array, "B T D"]]:
  """The prompts' keys and values, and their hidden states before the final norm."""
  embeds = model.qwen.embed_with(text, visual.tokens, model.dtype)
  segments = text.token_mask.astype(jnp.int32)
  rows, slots = segments.shape
  empty = KVCache.zeros(model.config.text, rows, slots, model.dtype)
  hidden, cache = model.qwen.language_model.hidden_states(
    embeds,
    text.position_ids,
    AttentionMask.causal(segments, segments),
    jnp.moveaxis(visual.deepstack, 1, 0),
    text.visual_index,
    empty,
    0,
  )
  assert isinstance(cache, KVCache)
  return cache, hidden


def last_states(
  hidden: Float[Array, "B T D"], token_mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
  """The hidden state of each prompt's last token."""
  last = jnp.sum(token_mask, axis=1) - 1
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def row_keys(key: Key[Array, ""], rows: int, group_size: int) -> Key[Array, "B G"]:
  """A key for sample g of row b that depends on nothing but `key`, b and g."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  keys = fold(key, jnp.arange(rows))
  return jax.vmap(fold, in_axes=(0, None))(keys, jnp.arange(group_size))


def start_groups(
  cache: KVCache,
  inputs: GenerationInputs,
  keys: Key[Array, "B G"],
  hidden_size: int,
  max_new_tokens: int,
  max_masks: int,
  pad: int,
) -> DecodeState:
  """The state of G samples a prompt that have no token yet."""
  b, g = keys.shape
  token_mask = inputs.text.token_mask
  return DecodeState(
    step=jnp.zeros((), jnp.int32),
    cache=GroupCache.start(cache, token_mask, g, max_new_tokens),
    first_positions=jnp.sum(token_mask, axis=1) + inputs.rope_deltas,
    keys=keys,
    next_token=jnp.zeros((b, g), jnp.int32),
    tokens=jnp.full((b, g, max_new_tokens), pad, jnp.int32),
    done=jnp.zeros((b, g), bool),
    seg_hidden=jnp.zeros((b, g, max_masks, hidden_size), cache.k.dtype),
    num_segs=jnp.zeros((b, g), jnp.int32),
    stats=None,
  )


def prefill(
  model: Sa2VA, inputs: GenerationInputs, max_new_tokens: int, max_masks: int, ids: TokenIds
) -> tuple[DecodeState, Float[Array, "B V"]]:
  """Runs the prompts; gives the state of one sample each without a token, and the last logits.

  The states at the [SEG]s of the prompts are kept.
  """
  text = inputs.text
  visual = model.qwen.visual_features(inputs.vision, model.dtype)
  cache, hidden = read_prompts(model, text, visual)
  keys = row_keys(jax.random.key(0), hidden.shape[0], 1)
  state = start_groups(cache, inputs, keys, hidden.shape[-1], max_new_tokens, max_masks, ids.pad)
  is_seg = (text.input_ids == ids.seg) & text.token_mask
  seg_hidden, num_segs = store_seg_states(
    state.seg_hidden[:, 0], state.num_segs[:, 0], hidden, is_seg
  )
  state = state.replace(seg_hidden=seg_hidden[:, None], num_segs=num_segs[:, None])
  return state, model.qwen.language_model.logits(last_states(hidden, text.token_mask))


def decode_step(
  language: TextDecoder, state: DecodeState, ids: TokenIds
) -> tuple[DecodeState, Float[Array, "B G V"]]:
  """Feeds `next_token` of every sample and gives the logits of the token after it."""
  positions = jnp.broadcast_to(
    (state.first_positions + state.step)[None, :, None], (3, *state.next_token.shape)
  )
  positions = constrain_batch(positions, axis=1)
  embeds = language.embed(state.next_token).astype(state.seg_hidden.dtype)
  hidden, cache = language.next_states(embeds, positions, state.cache, state.step)
  hidden = constrain_batch(hidden)  # else layers are divided as `choose` divides the logits
  is_seg = (state.next_token == ids.seg) & ~state.done
  seg_hidden, num_segs = jax.vmap(store_seg_states)(
    state.seg_hidden, state.num_segs, hidden[:, :, None], is_seg[:, :, None]
  )
  state = state.replace(step=state.step + 1, cache=cache, seg_hidden=seg_hidden, num_segs=num_segs)
  return state, language.logits(hidden)


def choose(
  state: DecodeState,
  logits: Float[Array, "B G V"],
  sampling: Sampling,
  forbidden: Bool[Array, "V"],
  ids: TokenIds,
) -> DecodeState:
  """Appends the chosen token of every sample that is not done."""
  b, g, v = logits.shape
  logits = rows_by_every_device(logits)
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys.reshape(-1), state.step)
  token = sample(keys, logits.reshape(b * g, v), sampling, forbidden).reshape(b, g)
  token = jnp.where(state.done, ids.pad, token)
  stats, token = state.stats, constrain_batch(token)
  if stats is not None:
    values = logp_and_entropy(logits / stats.temperature, token)
    logp, entropy = map(constrain_batch, values)
    stats = stats.replace(
      logps=stats.logps.at[:, :, state.step].set(jnp.where(state.done, 0.0, logp)),
      entropy=stats.entropy + jnp.where(state.done, 0.0, entropy),
    )
  return state.replace(
    next_token=token,
    tokens=state.tokens.at[:, :, state.step].set(token),
    done=state.done | (token == ids.end),
    stats=stats,
  )


def decode(
  model: Sa2VA,
  state: DecodeState,
  logits: Float[Array, "B V"],
  sampling: Sampling,
  ids: TokenIds,
) -> DecodeState:
  """From the prompts' last logits until all samples are done or have N tokens.

  On TPUs in `STAGES` loops, each of which reads the slots that it may reach.
  """
  vocab, (b, g, max_new_tokens) = logits.shape[-1], state.tokens.shape
  forbidden = jnp.zeros(vocab, bool).at[jnp.asarray(ids.forbidden, jnp.int32)].set(True)
  assert isinstance(state.cache, GroupCache)
  language, cache = model.qwen.language_model.for_decoding(state.cache)
  state = state.replace(cache=cache)

  def body(state: DecodeState) -> DecodeState:
    return choose(*decode_step(language, state, ids), sampling, forbidden, ids)

  first = jnp.broadcast_to(logits[:, None], (b, g, vocab))
  state = choose(state, first, sampling, forbidden, ids)
  stages = STAGES if on_tpu() and max_new_tokens >= MIN_STAGED else 1
  for stage in range(1, stages + 1):
    slots = max_new_tokens * stage // stages
    if stages > 1 and isinstance(state.cache, GroupCache):
      state = state.replace(cache=state.cache.replace(slots_read=slots))

    def goes_on(state: DecodeState, last: int = min(slots, max_new_tokens - 1)) -> Array:
      return (state.step < last) & ~jnp.all(state.done)

    state = jax.lax.while_loop(goes_on, body, state)
  return state


def token_lengths(tokens: Int32[Array, "*B N"], end: int) -> Int32[Array, "*B"]:
  """Tokens up to the first end token, which counts; N where there is none."""
  is_end = tokens == end
  return jnp.where(jnp.any(is_end, -1), jnp.argmax(is_end, -1) + 1, tokens.shape[-1])
