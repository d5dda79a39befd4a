"""Qwen3-VL vision tower: patches of all images of a sample to visual tokens and DeepStack taps."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from vrt_jax.config import VisionConfig
from vrt_jax.models.layers import (
  Embedding,
  LayerNorm,
  Linear,
  gelu_exact,
  gelu_tanh,
  in_row_blocks,
  recomputed,
  whole_weights,
  with_whole_weights,
)
from vrt_jax.models.stacks import map_layers, scan_layers, stack
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.rope import apply_rope, vision_cos_sin
from vrt_jax.ops.sharding import constrain_batch
from vrt_jax.types import VisionInputs

NORM_EPS = 1e-6

Rope = tuple[Array, Array]


class PatchEmbed(nnx.Module):
  """[B, P, C] -> [B, P, D]: one matrix product (HF Qwen3VLVisionPatchEmbed, a strided Conv3d)."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    axes = ("vision_embed", None)
    self.proj = Linear(config.patch_dim, config.hidden_size, axes=axes, rngs=rngs)

  def __call__(
    self, pixel_values: UInt8[Array, "B P C"] | Float[Array, "B P C"], dtype: DTypeLike
  ) -> Float[Array, "B P D"]:
    """uint8 values are normalised to -1 .. 1 in float32; floats are taken as normalised."""
    if pixel_values.dtype == jnp.uint8:
      pixel_values = (pixel_values.astype(jnp.float32) - 127.5) / 127.5
    return self.proj(pixel_values.astype(dtype))


class VisionAttention(nnx.Module):
  """[B, P, D] -> [B, P, D] within each image (HF Qwen3VLVisionAttention)."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    d = config.hidden_size
    axes = ("vision_heads", "vision_embed")
    self.qkv = Linear(d, 3 * d, axes=axes, head_dim=d // config.num_heads, rngs=rngs)
    self.proj = Linear(d, d, axes=("vision_embed", "vision_heads"), rngs=rngs)

  def __call__(
    self, x: Float[Array, "B P D"], rope: Rope, mask: AttentionMask
  ) -> Float[Array, "B P D"]:
    q, k, v = jnp.split(self.qkv(x), 3, axis=2)
    out = attention(apply_rope(q, *rope), apply_rope(k, *rope), v, mask)
    return self.proj(out.reshape(x.shape))


class VisionMLP(nnx.Module):
  """[.., D] -> [.., D] with tanh GELU (HF Qwen3VLVisionMLP)."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    d, f = config.hidden_size, config.intermediate_size
    self.linear_fc1 = Linear(d, f, axes=("vision_mlp", "vision_embed"), rngs=rngs)
    self.linear_fc2 = Linear(f, d, axes=("vision_embed", "vision_mlp"), rngs=rngs)

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return self.linear_fc2(gelu_tanh(self.linear_fc1(x)))


class VisionBlock(nnx.Module):
  """[B, P, D] -> [B, P, D], pre-norm (HF Qwen3VLVisionBlock)."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    self.norm1 = LayerNorm(config.hidden_size, NORM_EPS, rngs)
    self.norm2 = LayerNorm(config.hidden_size, NORM_EPS, rngs)
    self.attn = VisionAttention(config, rngs)
    self.mlp = VisionMLP(config, rngs)

  def __call__(
    self, x: Float[Array, "B P D"], rope: Rope, mask: AttentionMask
  ) -> Float[Array, "B P D"]:
    x = x + self.attn(self.norm1(x), rope, mask)
    return in_row_blocks(lambda x: x + self.mlp(self.norm2(x)), x)


class PatchMerger(nnx.Module):
  """[B, P, D] -> [B, P / merge**2, out] with exact GELU (HF Qwen3VLVisionPatchMerger).

  The main merger normalises patches before the fold, the DeepStack ones merged tokens after it.
  """

  def __init__(self, config: VisionConfig, *, norm_after_fold: bool, rngs: nnx.Rngs):
    folded = config.hidden_size * config.spatial_merge_size**2
    self.norm = LayerNorm(folded if norm_after_fold else config.hidden_size, NORM_EPS, rngs)
    self.linear_fc1 = Linear(folded, folded, axes=("vision_mlp", "vision_embed"), rngs=rngs)
    out = config.out_hidden_size
    self.linear_fc2 = Linear(folded, out, axes=("vision_embed", "vision_mlp"), rngs=rngs)
    self.norm_after_fold = norm_after_fold
    self.folded = folded

  def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P/4 out"]:
    if not self.norm_after_fold:
      x = self.norm(x)
    x = x.reshape(x.shape[0], -1, self.folded)
    if self.norm_after_fold:
      x = self.norm(x)
    return self.linear_fc2(gelu_exact(self.linear_fc1(x)))


class VisionTower(nnx.Module):
  """VisionInputs of P patches -> visual tokens [B, P / merge**2, out] and DeepStack features
  [n, B, P / merge**2, out] (HF Qwen3VLVisionModel)."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    self.config = config
    self.patch_embed = PatchEmbed(config, rngs)
    axes = (None, "vision_embed")
    self.pos_embed = Embedding(
      config.num_position_embeddings, config.hidden_size, axes=axes, rngs=rngs
    )
    self.blocks = stack(lambda rngs: VisionBlock(config, rngs), config.depth, rngs)
    self.merger = PatchMerger(config, norm_after_fold=False, rngs=rngs)
    taps = len(config.deepstack_indexes)
    self.deepstack_merger_list = (
      stack(lambda rngs: PatchMerger(config, norm_after_fold=True, rngs=rngs), taps, rngs)
      if taps
      else None
    )

  def __call__(
    self, vision: VisionInputs, dtype: DTypeLike
  ) -> tuple[Float[Array, "B Vt out"], Float[Array, "n B Vt out"]]:
    """Rows of padding patches carry no meaning."""
    x = self.patch_embed(vision.pixel_values, dtype)
    x = x + self._position_embeddings(vision).astype(dtype)
    rope = vision_cos_sin(vision.patch_positions, self.config.hidden_size // self.config.num_heads)
    mask = AttentionMask(vision.patch_segments, vision.patch_segments)
    x, taps = self._run_blocks(x, rope, mask)
    return with_whole_weights(self.merger)(x), self._merge_taps(taps)

  def _position_embeddings(self, vision: VisionInputs) -> Float[Array, "B P D"]:
    rows = with_whole_weights(self.pos_embed)(vision.pos_embed_index)  # [B, P, 4, D]
    return jnp.einsum("bpcd,bpc->bpd", rows.astype(jnp.float32), vision.pos_embed_weight)

  def _run_blocks(
    self, x: Float[Array, "B P D"], rope: Rope, mask: AttentionMask
  ) -> tuple[Float[Array, "B P D"], Float[Array, "n B P D"]]:
    """Scans the blocks; the states after `deepstack_indexes` land in the taps, in that order."""
    num_taps = len(self.config.deepstack_indexes)
    slots = np.full(self.config.depth, num_taps)  # slot num_taps lies outside and is dropped
    slots[list(self.config.deepstack_indexes)] = np.arange(num_taps)
    graphdef, state = nnx.split(self.blocks)

    def body(carry: tuple[Array, Array], layer: tuple) -> tuple[Any, None]:
      x, taps = carry
      block_state, slot = layer
      x = constrain_batch(x)
      x = nnx.merge(graphdef, whole_weights(block_state))(x, rope, mask)
      if num_taps:
        taps = taps.at[slot].set(x, mode="drop")
      return (x, taps), None

    taps = jnp.zeros((num_taps, *x.shape), x.dtype)
    return scan_layers(recomputed(body), (x, taps), state, jnp.asarray(slots))

  def _merge_taps(self, taps: Float[Array, "n B P D"]) -> Float[Array, "n B P/4 out"]:
    if self.deepstack_merger_list is None:
      _, b, p, _ = taps.shape
      merged = p // self.config.spatial_merge_size**2
      return jnp.zeros((0, b, merged, self.config.out_hidden_size), taps.dtype)
    graphdef, state = nnx.split(self.deepstack_merger_list)
    return map_layers(
      lambda state, tap: nnx.merge(graphdef, state)(tap), whole_weights(state), taps
    )
