"""Points, boxes and masks as prompt embeddings (sam2 sam/prompt_encoder.py)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from vrt_jax.config import Sam2Config
from vrt_jax.models.layers import LayerNorm, Linear, gelu_exact, param

NOT_A_POINT = -1
NEGATIVE = 0
POSITIVE = 1
BOX_TOP_LEFT = 2
BOX_BOTTOM_RIGHT = 3
MASK_CHANNELS = 16
NORM_EPS = 1e-6


class Buffer(nnx.Param):
  """A value that is stored with the parameters and never trained."""


class Tokens(nnx.Module):
  """A table of K learned tokens, weight [K, D].

  They start small, so that at first the prompt decides what the tokens say: the decoder's first
  block replaces each token by a mean over all of them, in which a prompt among standard-normal
  tokens (the reference's start) is lost, and training from random weights stalls for long.
  """

  def __init__(self, num_tokens: int, features: int, rngs: nnx.Rngs):
    init = nnx.initializers.normal(0.02)
    self.weight = param(rngs, (num_tokens, features), init, (None, None))


class RandomFourier(nnx.Module):
  """Coordinates in [0, 1], (.., 2) as x, y -> (.., D), float32 (sam2 PositionEmbeddingRandom)."""

  def __init__(self, features: int, rngs: nnx.Rngs):
    init = nnx.initializers.normal(1.0)
    shape = (2, features // 2)
    matrix = param(rngs, shape, init, (None, None), Buffer)
    self.positional_encoding_gaussian_matrix = matrix

  def __call__(self, coordinates: Float[Array, "*B 2"]) -> Float[Array, "*B D"]:
    matrix = jax.lax.stop_gradient(self.positional_encoding_gaussian_matrix[...])
    centred = 2.0 * coordinates.astype(jnp.float32) - 1.0
    precision = jax.lax.Precision.HIGHEST
    angles = 2.0 * np.pi * jnp.matmul(centred, matrix.astype(jnp.float32), precision=precision)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class PatchConv(nnx.Module):
  """[B, M, 2Y, 2X, in] -> [B, M, Y, X, out]: 2x2 convolution of stride 2."""

  def __init__(self, in_features: int, out_features: int, rngs: nnx.Rngs):
    init = nnx.initializers.normal((4 * in_features) ** -0.5)
    self.weight = param(rngs, (out_features, in_features, 2, 2), init, (None,) * 4)
    self.bias = param(rngs, (out_features,), nnx.initializers.zeros, (None,))

  def __call__(self, x: Float[Array, "B M Y2 X2 in"]) -> Float[Array, "B M Y X out"]:
    b, m, height, width, d = x.shape
    x = x.reshape(b, m, height // 2, 2, width // 2, 2, d)
    out = jnp.einsum("bmykxlc,ockl->bmyxo", x, self.weight[...].astype(x.dtype))
    return out + self.bias[...].astype(x.dtype)


class PromptEncoder(nnx.Module):
  """Prompts in pixels of the model's input image -> sparse and dense embeddings (PromptEncoder)."""

  def __init__(self, config: Sam2Config, rngs: nnx.Rngs):
    d = config.d_model
    self.image_size_px = config.image_size_px
    self.feature_size = config.feature_size
    self.pe_layer = RandomFourier(d, rngs)
    self.point_embeddings = nnx.List([Tokens(1, d, rngs) for _ in range(4)])
    self.not_a_point_embed = Tokens(1, d, rngs)
    self.no_mask_embed = Tokens(1, d, rngs)
    small = MASK_CHANNELS // 4
    self.mask_downscaling = nnx.List(
      [
        PatchConv(1, small, rngs),
        LayerNorm(small, NORM_EPS, rngs),
        PatchConv(small, MASK_CHANNELS, rngs),
        LayerNorm(MASK_CHANNELS, NORM_EPS, rngs),
        Linear(MASK_CHANNELS, d, rngs=rngs),
      ]
    )

  def image_pe(self) -> Float[Array, "S D"]:
    """Positions of the S = y * x cells of the stride-16 map, row by row, float32."""
    centres = (np.arange(self.feature_size, dtype=np.float32) + 0.5) / self.feature_size
    x, y = np.meshgrid(centres, centres)
    return self.pe_layer(jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=-1)))

  def embed_points(
    self, points: Float[Array, "B M K 2"], labels: Int32[Array, "B M K"]
  ) -> Float[Array, "B M K+1 D"]:
    """K points (x, y in pixels) and the closing not-a-point, float32.

    Labels: -1 not a point (its coordinates do not matter), 0 negative, 1 positive, 2 and 3 the
    top-left and bottom-right corner of a box.
    """
    points = jnp.pad(points, ((0, 0), (0, 0), (0, 1), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, 0), (0, 1)), constant_values=NOT_A_POINT)[..., None]
    kinds = jnp.concatenate([t.weight[...] for t in self.point_embeddings])
    kinds = jax.nn.one_hot(labels[..., 0], len(self.point_embeddings)) @ kinds.astype(jnp.float32)
    located = self.pe_layer((points + 0.5) / self.image_size_px) + kinds
    return jnp.where(labels == NOT_A_POINT, self.not_a_point_embed.weight[0], located)

  def embed_boxes(self, boxes: Float[Array, "B M 4"]) -> Float[Array, "B M 3 D"]:
    """Boxes (x0, y0, x1, y1 in pixels) as two corner points and the closing not-a-point."""
    corners = boxes.reshape(*boxes.shape[:2], 2, 2)
    labels = jnp.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], jnp.int32)
    return self.embed_points(corners, jnp.broadcast_to(labels, corners.shape[:3]))

  def embed_masks(self, masks: Float[Array, "B M Y4 X4"]) -> Float[Array, "B M Y X D"]:
    """Mask logits of stride 4 as dense embeddings of stride 16."""
    conv1, norm1, conv2, norm2, project = self.mask_downscaling
    x = gelu_exact(norm1(conv1(masks[..., None])))
    return project(gelu_exact(norm2(conv2(x))))

  def without_points(self) -> Float[Array, "2 D"]:
    """Sparse embeddings of a prompt without a point: SAM 2 sends two not-a-point tokens."""
    return jnp.tile(self.not_a_point_embed.weight[...], (2, 1))
