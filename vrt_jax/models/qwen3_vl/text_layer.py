"""A layer of Qwen3-VL's text decoder: grouped attention with adapters, and SwiGLU."""

from collections.abc import Sequence
from functools import partial

import jax
from flax import nnx, struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key

from vrt_jax.config import LoraConfig, TextConfig
from vrt_jax.models.adapters import Dropout, LoraLinear, draw_dropouts
from vrt_jax.models.layers import RMSNorm
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache, LayerCache
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.group_attention import PackedMask, packed_attention
from vrt_jax.ops.rope import apply_rope

Rope = tuple[Array, Array]
Mask = AttentionMask | PackedMask | None
Cache = KVCache | GroupCache | LayerCache


class CacheSlice(struct.PyTreeNode):
  """Where a layer reads and writes: the cache, its layer in it and the first new slot."""

  cache: Cache
  layer: ArrayLike
  slot: ArrayLike


def _split(key: Key[Array, ""] | None) -> tuple[Array | None, Array | None]:
  """Two keys for one, none for none."""
  return (None, None) if key is None else tuple(jax.random.split(key))


def _dropouts(
  lora: LoraConfig, key: Key[Array, ""] | None, x: Array, count: int
) -> Sequence[Dropout | None]:
  """For `count` adapted linear layers that read x; a key turns them on."""
  if key is None or not lora.rank or not lora.dropout:
    return [None] * count
  return draw_dropouts(key, x.shape, lora.dropout, count)


class TextAttention(nnx.Module):
  """[B, T, D] -> [B, T, D], grouped heads with q and k norms (HF Qwen3VLTextAttention)."""

  def __init__(self, config: TextConfig, lora: LoraConfig, rngs: nnx.Rngs):
    d, h = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_heads * h, config.num_kv_heads * h
    heads = partial(LoraLinear, d, head_dim=h, lora=lora, rngs=rngs)
    self.q_proj = heads(q_width, axes=("heads", "embed"))
    self.k_proj = heads(kv_width, axes=("kv", "embed"))
    self.v_proj = heads(kv_width, axes=("kv", "embed"))
    self.o_proj = LoraLinear(q_width, d, axes=("embed", "heads"), lora=lora, rngs=rngs)
    self.q_norm = RMSNorm(h, config.rms_norm_eps, rngs)
    self.k_norm = RMSNorm(h, config.rms_norm_eps, rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rope: Rope,
    mask: Mask,
    cached: CacheSlice | None,
    dropout_key: Key[Array, ""] | None,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    keys = _split(dropout_key)
    drop_q, drop_k, drop_v = _dropouts(self.q_proj.lora, keys[0], x, 3)
    q = apply_rope(self.q_norm(self.q_proj(x, drop_q)), *rope)
    k = apply_rope(self.k_norm(self.k_proj(x, drop_k)), *rope)
    v = self.v_proj(x, drop_v)
    cache = None
    if isinstance(mask, PackedMask):
      out = packed_attention(q, k, v, mask)
    elif cached is not None:
      cache = cached.cache.write(cached.layer, cached.slot, k, v)
      out = cache.attend(cached.layer, cached.slot, q, mask)
    else:
      out = attention(q, k, v, mask)
    out = out.reshape(*x.shape[:-1], -1)
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
    cached: CacheSlice | None,
    dropout_key: Key[Array, ""] | None,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    keys = _split(dropout_key)
    out, cache = self.self_attn(self.input_layernorm(x), rope, mask, cached, keys[0])
    x = x + out
    return x + self.mlp(self.post_attention_layernorm(x), keys[1]), cache
