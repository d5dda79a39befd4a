"""Qwen3-VL text decoder: scanned layers with M-RoPE, DeepStack injection and a slot cache."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int32, Key

from vrt_jax.config import LoraConfig, Remat, TextConfig
from vrt_jax.models.layers import (
  GATHERED,
  KEEP_ATTENTION,
  Dropout,
  Embedding,
  Linear,
  LoraLinear,
  RMSNorm,
  draw_dropouts,
  whole_weights,
  with_whole_weights,
)
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache, LayerCache
from vrt_jax.models.stacks import layer_of, scan_layers, stack
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.group_attention import PackedMask, packed_attention
from vrt_jax.ops.linear import linear
from vrt_jax.ops.rope import apply_rope, mrope_cos_sin
from vrt_jax.ops.sharding import constrain_batch, divides_weights, gathered, platform

Rope = tuple[Array, Array]
Mask = AttentionMask | PackedMask | None
Cache = KVCache | GroupCache | LayerCache
DecodingCache = GroupCache | tuple[LayerCache, ...]
"""Of all layers in one, or of each layer by itself."""
UNROLLED = 4
"""So few layers stand one by one on CPUs, where a scan stacks and copies what the backward pass
needs; more would take long to compile."""
REMAT_POLICIES = {
  "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
  "full": KEEP_ATTENTION,
  "linears": jax.checkpoint_policies.save_from_both_policies(
    KEEP_ATTENTION, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}
"""What `jax.checkpoint` keeps, by `OptimConfig.remat`; of attention only where it is a kernel."""


@struct.dataclass
class _CacheSlice:
  """Where a layer reads and writes: the cache, its layer in it and the first new slot."""

  cache: Cache
  layer: Int32[Array, ""] | None
  slot: Int32[Array, ""]


def gather_visual(
  features: Float[Array, "B Vt D"], visual_index: Int32[Array, "B T"]
) -> Float[Array, "B T D"]:
  """The feature of the visual token at each position, zeros for text (index -1)."""
  return jax.vmap(
    lambda rows, index: rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
  )(features, visual_index)


def _split(key: Key[Array, ""] | None) -> tuple[Array | None, Array | None]:
  """Two keys for one, none for none."""
  return (None, None) if key is None else tuple(jax.random.split(key))


def _dropouts(
  lora: LoraConfig, key: Key[Array, ""] | None, x: Array, count: int
) -> list[Dropout | None]:
  """For `count` adapted linear layers that read x; a key turns them on."""
  if key is None or not lora.rank or not lora.dropout:
    return [None] * count
  return draw_dropouts(key, x.shape, lora.dropout, count)


class TextAttention(nnx.Module):
  """[B, T, D] -> [B, T, D], grouped heads with q and k norms (HF Qwen3VLTextAttention)."""

  def __init__(self, config: TextConfig, lora: LoraConfig, rngs: nnx.Rngs):
    d, h = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_heads * h, config.num_kv_heads * h
    self.q_proj = LoraLinear(d, q_width, axes=("heads", "embed"), lora=lora, rngs=rngs)
    self.k_proj = LoraLinear(d, kv_width, axes=("kv", "embed"), lora=lora, rngs=rngs)
    self.v_proj = LoraLinear(d, kv_width, axes=("kv", "embed"), lora=lora, rngs=rngs)
    self.o_proj = LoraLinear(q_width, d, axes=("embed", "heads"), lora=lora, rngs=rngs)
    self.q_norm = RMSNorm(h, config.rms_norm_eps, rngs)
    self.k_norm = RMSNorm(h, config.rms_norm_eps, rngs)
    self.head_dim = h

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rope: Rope,
    mask: Mask,
    cached: _CacheSlice | None,
    dropout_key: Key[Array, ""] | None,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    b, t, _ = x.shape
    heads = (b, t, -1, self.head_dim)
    keys = _split(dropout_key)
    drop_q, drop_k, drop_v = _dropouts(self.q_proj.lora, keys[0], x, 3)
    q = apply_rope(self.q_norm(self.q_proj(x, drop_q).reshape(heads)), *rope)
    k = apply_rope(self.k_norm(self.k_proj(x, drop_k).reshape(heads)), *rope)
    v = self.v_proj(x, drop_v).reshape(heads)
    cache = None
    if cached is not None:
      cache = cached.cache.write(cached.layer, cached.slot, k, v)
      out = cache.attend(cached.layer, cached.slot, q, mask)
    elif isinstance(mask, PackedMask):
      out = packed_attention(q, k, v, mask)
    else:
      out = attention(q, k, v, mask)
    out = out.reshape(b, t, -1)
    return self.o_proj(out, *_dropouts(self.o_proj.lora, keys[1], out, 1)), cache


@partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
  """Computed again in the backward pass: else it keeps three more arrays of this width a layer."""
  return jax.nn.silu(gate) * up


class TextMLP(nnx.Module):
  """[.., D] -> [.., D], SwiGLU (HF Qwen3VLTextMLP)."""

  def __init__(self, config: TextConfig, lora: LoraConfig, rngs: nnx.Rngs):
    d, f = config.hidden_size, config.intermediate_size
    self.gate_proj = LoraLinear(d, f, axes=("mlp", "embed"), lora=lora, rngs=rngs)
    self.up_proj = LoraLinear(d, f, axes=("mlp", "embed"), lora=lora, rngs=rngs)
    self.down_proj = LoraLinear(f, d, axes=("embed", "mlp"), lora=lora, rngs=rngs)

  def __call__(
    self, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
  ) -> Float[Array, "*B D"]:
    keys = _split(dropout_key)
    drop_gate, drop_up = _dropouts(self.gate_proj.lora, keys[0], x, 2)
    gated = _gated(self.gate_proj(x, drop_gate), self.up_proj(x, drop_up))
    return self.down_proj(gated, *_dropouts(self.down_proj.lora, keys[1], gated, 1))


class DecoderLayer(nnx.Module):
  """[B, T, D] -> [B, T, D], pre-norm (HF Qwen3VLTextDecoderLayer)."""

  def __init__(self, config: TextConfig, lora: LoraConfig, rngs: nnx.Rngs):
    self.self_attn = TextAttention(config, lora, rngs)
    self.mlp = TextMLP(config, lora, rngs)
    self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rope: Rope,
    mask: Mask,
    cached: _CacheSlice | None,
    dropout_key: Key[Array, ""] | None,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    keys = _split(dropout_key)
    out, cache = self.self_attn(self.input_layernorm(x), rope, mask, cached, keys[0])
    x = x + out
    return x + self.mlp(self.post_attention_layernorm(x), keys[1]), cache


class TextDecoder(nnx.Module):
  """Embeddings [B, T, D] -> hidden states [B, T, D] -> logits [B, T, V] (HF Qwen3VLTextModel
  and the head of Qwen3VLForConditionalGeneration)."""

  def __init__(self, config: TextConfig, lora: LoraConfig, rngs: nnx.Rngs):
    self.config = config
    v, d, axes = config.vocab_size, config.hidden_size, ("vocab", "embed")
    self.embed_tokens = Embedding(v, d, axes=axes, rngs=rngs)
    self.layers = stack(lambda rngs: DecoderLayer(config, lora, rngs), config.num_layers, rngs)
    self.norm = RMSNorm(d, config.rms_norm_eps, rngs)
    tied = config.tie_embeddings
    self.lm_head = None if tied else Linear(d, v, bias=False, axes=axes, rngs=rngs)

  def embed(self, input_ids: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """Token embeddings in the dtype of the table.

    A divided table is read where it lies, by the ids of all devices, instead of being gathered.
    """
    return constrain_batch(self.embed_tokens(gathered(input_ids)))

  def final_norm(self, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The last RMSNorm, which `hidden_states` leaves out."""
    return self.norm(hidden_states)

  def head_weight(self) -> Float[Array, "V D"]:
    """The output matrix: `lm_head`, or the embeddings where they are tied."""
    return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

  def logits(self, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """float32 logits of states before the final norm."""
    x = self.final_norm(hidden_states)
    return linear(x, self.head_weight().astype(x.dtype), jnp.float32)

  def hidden_states(
    self,
    inputs_embeds: Float[Array, "B T D"],
    position_ids: Int32[Array, "3 B T"],
    mask: Mask,
    deepstack: Float[Array, "n B Vt D"] | None = None,
    visual_index: Int32[Array, "B T"] | None = None,
    cache: Cache | None = None,
    cache_slot: ArrayLike = 0,
    *,
    dropout_key: Key[Array, ""] | None = None,
    remat: Remat = "none",
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Output of the last layer before the final norm, and the cache with the T new slots.

    With a `KVCache` the keys and values go to slots cache_slot .. cache_slot + T - 1 of every row
    and `mask` covers all S slots; without one it covers the T inputs. DeepStack features k are
    added after layer k at positions with `visual_index` >= 0. `dropout_key` turns LoRA dropout on,
    `remat` says what the backward pass computes again (OptimConfig).

    Raises ValueError where `deepstack` comes without `visual_index`.
    """
    if deepstack is not None and visual_index is None:
      raise ValueError("hidden_states: deepstack features need a visual_index")
    config = self.config
    rope = mrope_cos_sin(position_ids, config.head_dim, config.rope_theta, config.mrope_section)
    graphdef, state = nnx.split(self.layers)

    def body(carry, layer_inputs):
      x, cache = constrain_batch(carry[0]), carry[1]
      layer_state, (layer, key) = layer_inputs
      cached = None if cache is None else _CacheSlice(cache, layer, cache_slot)
      layer_module = nnx.merge(graphdef, whole_weights(layer_state))
      x, cache = layer_module(x, rope, mask, cached, key)
      if deepstack is not None:
        x = _add_deepstack(x, deepstack, visual_index, layer)
      return (x, cache), None

    if remat != "none" or divides_weights():
      body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[remat])
    keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
    return scan_layers(
      body,
      (inputs_embeds, cache),
      state,
      (jnp.arange(config.num_layers), keys),
      unroll=config.num_layers if platform() == "cpu" and config.num_layers <= UNROLLED else 1,
    )

  def for_decoding(self, cache: GroupCache) -> tuple["TextDecoder", DecodingCache]:
    """A copy for `next_states` and its cache, made once before the loop over tokens.

    Weights that the fsdp axis divides are gathered, instead of once a token. For CPUs layers stand
    one by one: a scan copies a layer's weights before it multiplies a vector by them.
    """
    copy = nnx.merge(*nnx.split(self))
    copy.layers = with_whole_weights(copy.layers)
    if copy.lm_head is None:
      copy.embed_tokens = with_whole_weights(copy.embed_tokens)
    else:
      copy.lm_head = with_whole_weights(copy.lm_head)
    if platform() != "cpu":
      return copy, cache
    graphdef, state = nnx.split(copy.layers)
    copy.layers = nnx.List(
      nnx.merge(graphdef, layer_of(state, i)) for i in range(self.config.num_layers)
    )
    return copy, cache.by_layer()

  def next_states(
    self,
    inputs_embeds: Float[Array, "B G D"],
    position_ids: Int32[Array, "3 B G"],
    cache: DecodingCache,
    slot: ArrayLike,
  ) -> tuple[Float[Array, "B G D"], DecodingCache]:
    """`hidden_states` of one new token of each sample of a group, which goes to `slot`.

    For a decoder and a cache that `for_decoding` made.
    """
    if isinstance(cache, GroupCache):
      return self.hidden_states(inputs_embeds, position_ids, None, cache=cache, cache_slot=slot)
    config = self.config
    rope = mrope_cos_sin(position_ids, config.head_dim, config.rope_theta, config.mrope_section)
    x, written = inputs_embeds, []
    for layer, own in zip(self.layers, cache, strict=True):
      x, own = layer(constrain_batch(x), rope, None, _CacheSlice(own, None, slot), None)
      x = jax.lax.optimization_barrier(x)  # rounded to its dtype, as a scan's carry is
      written.append(own)
    return x, tuple(written)


def _add_deepstack(
  x: Float[Array, "B T D"],
  deepstack: Float[Array, "n B Vt D"],
  visual_index: Int32[Array, "B T"],
  layer: Int32[Array, ""],
) -> Float[Array, "B T D"]:
  """x plus the features of this layer; layers from n on skip the gather."""

  def add(x):
    features = jax.lax.dynamic_index_in_dim(deepstack, layer, keepdims=False)
    return x + gather_visual(features, visual_index).astype(x.dtype)

  return jax.lax.cond(layer < deepstack.shape[0], add, lambda x: x, x)
