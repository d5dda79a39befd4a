"""Sa2VA: Qwen3-VL whose [SEG] hidden states prompt the SAM 2 mask decoder."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32, Key, UInt8

from vrt_jax.config import ModelConfig, Remat
from vrt_jax.models.layers import Linear, ShapeRngs, with_whole_weights
from vrt_jax.models.qwen3_vl.model import Qwen3VL
from vrt_jax.models.sam2.model import ImageFeatures, MaskOutput, Sam2
from vrt_jax.types import Batch


class Sa2VAOutput(flax.struct.PyTreeNode):
  """What a training forward pass gives the losses."""

  hidden_states: Float[Array, "B T D"]
  """After the final norm: the input of the output embedding."""
  masks: MaskOutput
  """Low-resolution mask logits of the sampled [SEG], [B, M, Y, X]."""


class TextHiddenFcs(nnx.Module):
  """[.., D] -> [.., d_model]: Linear, ReLU, Linear (reference: Sa2VA `text_hidden_fcs`)."""

  def __init__(self, hidden_size: int, d_model: int, rngs: nnx.Rngs):
    self.fc1 = Linear(hidden_size, hidden_size, axes=("mlp", "embed"), rngs=rngs)
    self.fc2 = Linear(hidden_size, d_model, axes=(None, "mlp"), rngs=rngs)

  def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    return self.fc2(jax.nn.relu(self.fc1(hidden)))


class Sa2VA(nnx.Module):
  """Batch -> hidden states and one mask a [SEG] (reference: Sa2VAChatModelQwen)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.qwen = Qwen3VL(config, rngs)
    self.text_hidden_fcs = TextHiddenFcs(config.text.hidden_size, config.sam2.d_model, rngs)
    self.sam2 = Sam2(config.sam2, rngs)

  @property
  def dtype(self) -> jnp.dtype:
    """Dtype of activations."""
    return jnp.dtype(self.config.compute_dtype)

  def language_embeddings(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    """Prompts of the mask decoder from the last layer's output (before the final norm) at [SEG]."""
    if self.config.seg_hidden == "post_norm":
      hidden = self.qwen.language_model.final_norm(hidden)
    return with_whole_weights(self.text_hidden_fcs)(hidden)

  def masks(
    self, grounding_image: UInt8[Array, "B Y X 3"], seg_hidden: Float[Array, "B M D"]
  ) -> MaskOutput:
    """One mask a [SEG]; SAM 2's image encoder runs once an image."""
    features = self.sam2.encode_image(grounding_image, self.dtype)
    return self.decode_masks(features, seg_hidden)

  def decode_masks(self, features: ImageFeatures, seg_hidden: Float[Array, "B M D"]) -> MaskOutput:
    """One mask a [SEG] from what SAM 2's image encoder made of the images."""
    return self.sam2.decode_masks(features, self.language_embeddings(seg_hidden))

  def __call__(
    self, batch: Batch, *, dropout_key: Key[Array, ""] | None = None, remat: Remat = "none"
  ) -> Sa2VAOutput:
    hidden = self.qwen(
      batch.text, batch.vision, dropout_key=dropout_key, remat=remat, dtype=self.dtype
    )
    return Sa2VAOutput(
      hidden_states=self.qwen.language_model.final_norm(hidden),
      masks=self.masks(
        batch.grounding_image, gather_positions(hidden, batch.targets.seg_positions)
      ),
    )


def abstract_sa2va(config: ModelConfig) -> Sa2VA:
  """The model with shapes instead of arrays.

  Raises:
    ValueError: sizes that do not fit together.
  """
  return nnx.eval_shape(lambda: Sa2VA(config, ShapeRngs()))


def gather_positions(
  hidden: Float[Array, "B T D"], positions: Int32[Array, "B M"]
) -> Float[Array, "B M D"]:
  """Rows of `hidden` at the given positions of each sample."""
  return jnp.take_along_axis(hidden, positions[..., None], axis=1)
