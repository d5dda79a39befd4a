"""SAM 2 for single images (Ravi et al., arXiv 2408.00714; sam2 modeling/sam2_base.py).

No memory attention: `no_mem_embed` stands for the empty memory, as in SAM2ImagePredictor.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from vrt_jax.config import Sam2Config
from vrt_jax.models.layers import param
from vrt_jax.models.sam2.mask_decoder import DecodedTokens, MaskDecoder, draw_masks
from vrt_jax.models.sam2.neck import ImageEncoder
from vrt_jax.models.sam2.prompt_encoder import PromptEncoder

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
TRUNK_STRIDE = 32
STABILITY_DELTA = 0.05
STABLE = 0.98
"""Least share of the pixels above -STABILITY_DELTA that are above STABILITY_DELTA as well."""


class ImageFeatures(struct.PyTreeNode):
  """Pyramid maps of an image; nothing of the mask decoder has touched them."""

  stride4: Float[Array, "B Y4 X4 D"]
  stride8: Float[Array, "B Y8 X8 D"]
  stride16: Float[Array, "B Y X D"]
  """With `no_mem_embed` added: the image embeddings that the mask decoder attends to."""


class MaskOutput(struct.PyTreeNode):
  """One mask an object."""

  low_res_masks: Float[Array, "B M Y4 X4"]
  """Logits of stride 4, float32."""
  iou_pred: Float[Array, "B M"]
  object_score_logits: Float[Array, "B M"]


class AllMasks(struct.PyTreeNode):
  """Every mask of the decoder: the single mask 0, then the multimask outputs."""

  masks: Float[Array, "B M K Y4 X4"]
  iou_pred: Float[Array, "B M K"]
  object_score_logits: Float[Array, "B M"]


def _check(config: Sam2Config) -> None:
  if config.image_size_px % TRUNK_STRIDE:
    raise ValueError(
      f"sam2.image_size_px {config.image_size_px} is not a multiple of {TRUNK_STRIDE}"
    )
  if config.mask_size % config.window_spec[0]:
    raise ValueError(
      f"sam2.window_spec[0] {config.window_spec[0]} does not divide the stride-4 map of "
      f"{config.mask_size} cells (image_size_px / 4)"
    )
  if len(config.stages) != 4 or len(config.window_spec) != 4:
    raise ValueError(
      f"sam2.stages {config.stages} and window_spec {config.window_spec} need four entries each"
    )
  if any(window % 2 for window in config.window_spec[:-1]):
    raise ValueError(f"sam2.window_spec {config.window_spec}: the first three must be even")


def normalize_image(image: UInt8[Array, "*B Y X 3"]) -> Float[Array, "*B Y X 3"]:
  """RGB bytes to ImageNet's mean 0 and standard deviation 1, float32."""
  return (image.astype(jnp.float32) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD


def stability(mask_logits: Float[Array, "*B Y X"]) -> Float[Array, "*B"]:
  """How sure a mask is of its edge: IoU of it cut above and below zero by STABILITY_DELTA.

  An empty mask is stable (1).
  """
  inner = jnp.sum(mask_logits > STABILITY_DELTA, axis=(-2, -1))
  outer = jnp.sum(mask_logits > -STABILITY_DELTA, axis=(-2, -1))
  return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)


def _best_multimask(out: DecodedTokens) -> tuple[Float[Array, "B M D0"], Float[Array, "B M"]]:
  """(mask vector, predicted IoU) of the multimask output whose predicted IoU is best."""
  iou_pred = out.iou_pred[:, :, 1:]
  best = jax.nn.one_hot(jnp.argmax(iou_pred, axis=-1), iou_pred.shape[-1])  # [B, M, K - 1]
  chosen = best.astype(out.mask_vectors.dtype)
  vector = jnp.einsum("bmk,bmkd->bmd", chosen, out.mask_vectors[:, :, 1:])
  return vector, jnp.sum(best * iou_pred, axis=-1)


class Sam2(nnx.Module):
  """Images [B, Y, X, 3] and prompts [B, M, ..] -> mask logits [B, M, Y/4, X/4] (SAM2Base).

  Raises ValueError where the configuration's sizes do not fit together.
  """

  def __init__(self, config: Sam2Config, rngs: nnx.Rngs):
    _check(config)
    self.feature_size = config.feature_size
    self.image_encoder = ImageEncoder(config, rngs)
    self.prompt_encoder = PromptEncoder(config, rngs)
    self.mask_decoder = MaskDecoder(config, rngs)
    normal = nnx.initializers.normal(0.02)
    self.no_mem_embed = param(rngs, (1, 1, config.d_model), normal, (None,) * 3)

  def encode_image(
    self,
    image: UInt8[Array, "B Y X 3"] | Float[Array, "B Y X 3"],
    dtype: DTypeLike = jnp.float32,
  ) -> ImageFeatures:
    """Trunk and neck, which stay frozen in fine-tuning; `dtype` is the compute dtype.

    Bytes are normalised here, a floating-point image is taken as normalised already.
    """
    if image.dtype == jnp.uint8:
      image = normalize_image(image)
    stride4, stride8, stride16 = self.image_encoder(image.astype(dtype))
    stride16 = stride16 + self.no_mem_embed[0, 0].astype(dtype)
    return ImageFeatures(stride4=stride4, stride8=stride8, stride16=stride16)

  def _decode(self, features: ImageFeatures, sparse: Array, dense: Array | None) -> DecodedTokens:
    high_res = self.mask_decoder.project_high_res(features.stride4, features.stride8)
    image = features.stride16
    cells = image.reshape(image.shape[0], -1, image.shape[-1])  # [B, S, D]
    if dense is None:
      cells = cells + self.prompt_encoder.no_mask_embed.weight[0].astype(image.dtype)
    else:
      flat = dense.reshape(*dense.shape[:2], -1, dense.shape[-1])
      cells = cells[:, None] + flat.astype(image.dtype)
    return self.mask_decoder(cells, self.prompt_encoder.image_pe(), high_res, sparse)

  def decode_prompts(
    self,
    features: ImageFeatures,
    sparse_prompt_embeddings: Float[Array, "B M K D"],
    dense_prompt_embeddings: Float[Array, "B M Y X D"] | None = None,
  ) -> AllMasks:
    """All masks for prompts of `prompt_encoder`; no dense prompt means the no-mask embedding."""
    out = self._decode(features, sparse_prompt_embeddings, dense_prompt_embeddings)
    return AllMasks(
      masks=draw_masks(out.mask_vectors, out.pixels, self.feature_size),
      iou_pred=out.iou_pred,
      object_score_logits=out.object_score_logits,
    )

  def language_prompt(self, embeddings: Float[Array, "B M D"]) -> Float[Array, "B M 3 D"]:
    """Sparse embeddings of a language prompt: two not-a-point tokens, then the embedding."""
    empty = self.prompt_encoder.without_points().astype(embeddings.dtype)
    empty = jnp.broadcast_to(empty, (*embeddings.shape[:2], *empty.shape))
    return jnp.concatenate([empty, embeddings[:, :, None]], axis=2)

  def decode_masks(
    self, features: ImageFeatures, language_embeddings: Float[Array, "B M D"]
  ) -> MaskOutput:
    """One mask a language embedding: the multimask output with the best predicted IoU.

    The objects of an image share its features. Only the chosen mask is drawn, and gradients flow
    through it alone, not through the choice.
    """
    out = self._decode(features, self.language_prompt(language_embeddings), None)
    vector, iou_pred = _best_multimask(out)
    masks = draw_masks(vector[:, :, None], out.pixels, self.feature_size)
    return MaskOutput(
      low_res_masks=masks[:, :, 0],
      iou_pred=iou_pred,
      object_score_logits=out.object_score_logits,
    )

  def decode_boxes(self, features: ImageFeatures, boxes: Float[Array, "B M 4"]) -> MaskOutput:
    """One mask a box (x0, y0, x1, y1 in pixels of the square input image).

    Mask 0, or, where it is not stable, the multimask output with the best predicted IoU: what
    SAM2ImagePredictor.predict(box=.., multimask_output=False) chooses in a model of build_sam2
    (MaskDecoder, dynamic_multimask_via_stability).
    """
    out = self._decode(features, self.prompt_encoder.embed_boxes(boxes), None)
    best, best_iou = _best_multimask(out)
    vectors = jnp.stack([out.mask_vectors[:, :, 0], best], axis=2)
    masks = draw_masks(vectors, out.pixels, self.feature_size)
    stable = stability(masks[:, :, 0]) >= STABLE
    return MaskOutput(
      low_res_masks=jnp.where(stable[..., None, None], masks[:, :, 0], masks[:, :, 1]),
      iou_pred=jnp.where(stable, out.iou_pred[:, :, 0], best_iou),
      object_score_logits=out.object_score_logits,
    )
