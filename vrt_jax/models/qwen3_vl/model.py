"""Qwen3-VL: visual tokens put into the token embeddings, then the text decoder."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from vrt_jax.config import ModelConfig, Remat
from vrt_jax.models.qwen3_vl.text import TextDecoder, gather_visual
from vrt_jax.models.qwen3_vl.vision import VisionTower
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.sharding import constrain_batch
from vrt_jax.types import TextInputs, VisionInputs, VisualFeatures


class Qwen3VL(nnx.Module):
  """TextInputs and VisionInputs -> pre-norm hidden states [B, T, D] (HF Qwen3VLModel)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    """Raises ValueError where the visual tokens are not as wide as the text decoder."""
    out, d = config.vision.out_hidden_size, config.text.hidden_size
    if out != d:
      raise ValueError(f"vision.out_hidden_size {out} differs from text.hidden_size {d}")
    self.visual = VisionTower(config.vision, rngs)
    self.language_model = TextDecoder(config.text, config.lora, rngs)

  def visual_features(self, vision: VisionInputs, dtype: DTypeLike = jnp.float32) -> VisualFeatures:
    """What the vision tower makes of the images."""
    tokens, deepstack = self.visual(vision, dtype)
    return VisualFeatures(tokens, jnp.moveaxis(deepstack, 0, 1))

  def embed_with(
    self, text: TextInputs, visual_tokens: Float[Array, "B Vt D"], dtype: DTypeLike = jnp.float32
  ) -> Float[Array, "B T D"]:
    """Token embeddings with the visual tokens in their places."""
    inputs_embeds = self.language_model.embed(text.input_ids).astype(dtype)
    visual = gather_visual(visual_tokens, text.visual_index)
    is_visual = text.visual_index[:, :, None] >= 0
    return constrain_batch(jnp.where(is_visual, visual, inputs_embeds))

  def embed_multimodal(
    self, text: TextInputs, vision: VisionInputs | None, dtype: DTypeLike = jnp.float32
  ) -> tuple[Float[Array, "B T D"], Float[Array, "n B Vt D"] | None]:
    """Token embeddings with the visual tokens in their places, and the DeepStack features."""
    if vision is None:
      return self.language_model.embed(text.input_ids).astype(dtype), None
    visual_tokens, deepstack = self.visual(vision, dtype)
    return self.embed_with(text, visual_tokens, dtype), deepstack

  def __call__(
    self,
    text: TextInputs,
    vision: VisionInputs | None,
    *,
    dropout_key: Key[Array, ""] | None = None,
    remat: Remat = "none",
    dtype: DTypeLike = jnp.float32,
  ) -> Float[Array, "B T D"]:
    """The full forward pass; rows of padding tokens carry no meaning."""
    inputs_embeds, deepstack = self.embed_multimodal(text, vision, dtype)
    segments = text.token_mask.astype(jnp.int32)
    mask = AttentionMask.causal(segments, segments)
    hidden_states, _ = self.language_model.hidden_states(
      inputs_embeds,
      text.position_ids,
      mask,
      deepstack,
      text.visual_index,
      dropout_key=dropout_key,
      remat=remat,
    )
    return hidden_states
