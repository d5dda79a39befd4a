"""Qwen3-VL text decoder: scanned layers with M-RoPE, DeepStack injection and a slot cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Float, Int32, Key

from vrt_jax.config import LoraConfig, Remat, TextConfig
from vrt_jax.models.adapters import LINEAR
from vrt_jax.models.layers import (
  GATHERED,
  KEEP_ATTENTION,
  Embedding,
  Linear,
  RMSNorm,
  whole_weights,
  with_whole_weights,
)
from vrt_jax.models.qwen3_vl.cache import GroupCache
from vrt_jax.models.qwen3_vl.text_layer import Cache, CacheSlice, DecoderLayer, Mask
from vrt_jax.models.stacks import layer_of, scan_layers, stack
from vrt_jax.ops.linear import linear
from vrt_jax.ops.rope import mrope_cos_sin
from vrt_jax.ops.sharding import (
  constrain_batch,
  divides_weights,
  gathered,
  platform,
  rows_by_tensor,
)
from vrt_jax.ops.splash import RESIDUALS

DecodingCache = GroupCache | tuple[Cache, ...]
"""Of all layers in one, or of each layer by itself."""
UNROLLED = 4
"""So few layers stand one by one on CPUs, where a scan stacks and copies what the backward pass
needs; more would take long to compile."""
REMAT_POLICIES = {
  "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
  "full": KEEP_ATTENTION,
  "linears": jax.checkpoint_policies.save_only_these_names(RESIDUALS, LINEAR),
}
"""What `jax.checkpoint` keeps, by `OptimConfig.remat`; of attention only where it is a kernel."""


def gather_visual(
  features: Float[Array, "B Vt D"], visual_index: Int32[Array, "B T"]
) -> Float[Array, "B T D"]:
  """The feature of the visual token at each position, zeros for text (index -1)."""
  return jax.vmap(
    lambda rows, index: rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
  )(features, visual_index)


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
    padded = linear(x, self.head_weight().astype(x.dtype), jnp.float32)  # `for_decoding` may pad
    return padded[..., : self.config.vocab_size]

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

    def body(carry: tuple[Array, Cache | None], layer_inputs: tuple) -> tuple[Any, None]:
      x, cache = constrain_batch(carry[0]), carry[1]
      layer_state, (layer, key) = layer_inputs
      cached = None if cache is None else CacheSlice(cache, layer, cache_slot)
      layer_module = nnx.merge(graphdef, whole_weights(layer_state))
      x, cache = layer_module(x, rope, mask, cached, key)
      if deepstack is not None and visual_index is not None and len(deepstack):
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

    Weights that the fsdp axis divides are gathered, instead of once a token, and the tensor axis
    divides the head's rows. But for TPUs layers stand one by one: a scan copies a layer's weights
    before it multiplies a vector by them, at every token. The copies of a GPU are made here, so
    that decoding holds the layers twice.
    """
    copy = nnx.merge(*nnx.split(self))
    head = copy.embed_tokens if copy.lm_head is None else copy.lm_head
    head.weight.set_value(rows_by_tensor(head.weight[...]))
    if platform() == "tpu":
      copy.layers = _row_major(with_whole_weights(copy.layers))
      return copy, cache
    graphdef, state = nnx.split(copy.layers)
    copy.layers = nnx.List(
      with_whole_weights(nnx.merge(graphdef, layer_of(state, i)))
      for i in range(self.config.num_layers)
    )
    return copy, cache.for_cpus() if platform() == "cpu" else cache.by_layer()

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
      x, whole = self.hidden_states(inputs_embeds, position_ids, None, None, None, cache, slot)
      assert isinstance(whole, GroupCache)
      return x, whole
    config = self.config
    rope = mrope_cos_sin(position_ids, config.head_dim, config.rope_theta, config.mrope_section)
    x = inputs_embeds
    written: list[Any] = []
    assert isinstance(self.layers, nnx.List)
    for layer, own in zip(self.layers, cache, strict=True):
      x, after = layer(constrain_batch(x), rope, None, CacheSlice(own, 0, slot), None)
      x = jax.lax.optimization_barrier(x)  # rounded to its dtype, as a scan's carry is
      written.append(after)
    return x, tuple(written)


def _row_major(module: nnx.Module) -> nnx.Module:
  """The module with parameters in the order in which products read them.

  Gathered ones XLA may leave in another, and copy in a loop at every turn.
  """
  graphdef, state = nnx.split(module)

  def ordered(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

  return nnx.merge(graphdef, jax.tree.map(ordered, state))


def _add_deepstack(
  x: Float[Array, "B T D"],
  deepstack: Float[Array, "n B Vt D"],
  visual_index: Int32[Array, "B T"],
  layer: Int32[Array, ""],
) -> Float[Array, "B T D"]:
  """x plus the features of this layer; layers from n on skip the gather."""

  def add(x: Array) -> Array:
    features = jax.lax.dynamic_index_in_dim(deepstack, layer, keepdims=False)
    return x + gather_visual(features, visual_index).astype(x.dtype)

  return jax.lax.cond(layer < deepstack.shape[0], add, lambda x: x, x)
