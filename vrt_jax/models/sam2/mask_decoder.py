"""SAM 2's mask decoder (sam2 sam/mask_decoder.py).

Upscaling never shuffles pixels of wide maps: a cell of the stride-16 map carries its 2x2 and then
its 4x4 pixels as extra axes, in which a transposed convolution of kernel and stride 2 is a matrix
product. High-resolution features enter that layout once an image, only finished masks leave it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array
from jaxtyping import Float

from vrt_jax.config import Sam2Config
from vrt_jax.models.layers import LayerNorm, Linear, gelu_exact, param
from vrt_jax.models.sam2.prompt_encoder import Tokens
from vrt_jax.models.sam2.transformer import MLP, TwoWayTransformer

NORM_EPS = 1e-6
FIRST_MASK_TOKEN = 2
"""Token 0 is the object score, token 1 the predicted IoU, then come the masks."""


class HighResFeatures(struct.PyTreeNode):
  """Projected pyramid maps in cell layout: S stride-16 cells with their pixels as axes."""

  s1: Float[Array, "B S 2 2 D1"]
  """Stride 8, D / 4 channels."""
  s0: Float[Array, "B S 2 2 2 2 D0"]
  """Stride 4, D / 8 channels: (row, column) of the stride-8 pixel, then within it."""


class DecodedTokens(struct.PyTreeNode):
  """What the decoder knows before a mask is drawn; masks are `mask_vectors` times `pixels`."""

  pixels: Float[Array, "B M S 2 2 2 2 D0"]
  mask_vectors: Float[Array, "B M K D0"]
  """K = 1 + num_multimask_outputs: the single mask, then the multimask outputs."""
  iou_pred: Float[Array, "B M K"]
  object_score_logits: Float[Array, "B M"]


class UpConv(nnx.Module):
  """(.., in) -> (.., 2, 2, out): torch's ConvTranspose2d with kernel 2 and stride 2.

  The new axes are the row and column of an output pixel in its input cell; weight [in, out, 2, 2].
  """

  def __init__(self, in_features: int, out_features: int, rngs: nnx.Rngs):
    init = nnx.initializers.normal(in_features**-0.5)
    self.weight = param(rngs, (in_features, out_features, 2, 2), init, (None,) * 4)
    self.bias = param(rngs, (out_features,), nnx.initializers.zeros, (None,))

  def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B 2 2 out"]:
    w = self.weight[...].astype(x.dtype).transpose(0, 2, 3, 1)  # [in, 2, 2, out]
    y = x @ w.reshape(x.shape[-1], -1)
    return y.reshape(*x.shape[:-1], *w.shape[1:]) + self.bias[...].astype(x.dtype)


def cells_2x(x: Float[Array, "B Y X D"]) -> Float[Array, "B S 2 2 D"]:
  """2x2 pixels to a cell."""
  b, y, x_size, d = x.shape
  x = x.reshape(b, y // 2, 2, x_size // 2, 2, d)
  return x.swapaxes(2, 3).reshape(b, -1, 2, 2, d)


def cells_4x(x: Float[Array, "B Y X D"]) -> Float[Array, "B S 2 2 2 2 D"]:
  """4x4 pixels to a cell, halves first."""
  b, y, x_size, d = x.shape
  x = x.reshape(b, y // 4, 2, 2, x_size // 4, 2, 2, d)
  return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, -1, 2, 2, 2, 2, d)


def _one_each(mlps: Sequence[MLP], x: Float[Array, "B M K D"]) -> Float[Array, "B M K D0"]:
  """Row k of x through the k-th of K equal networks, all at once."""
  graphdef = nnx.split(mlps[0])[0]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[nnx.state(mlp) for mlp in mlps])
  return jax.vmap(lambda s, x: nnx.merge(graphdef, s)(x), in_axes=(0, 2), out_axes=2)(stacked, x)


def draw_masks(
  mask_vectors: Float[Array, "B M K D0"], pixels: Float[Array, "B M S 2 2 2 2 D0"], rows: int
) -> Float[Array, "B M K Y X"]:
  """Mask logits in float32: inner products of vectors and pixels; `rows` of cells in a map."""
  b, m, s = pixels.shape[:3]
  k, d = mask_vectors.shape[2:]
  flat = pixels.reshape(b, m, s * 16, d)
  masks = jnp.einsum("bmkd,bmpd->bmkp", mask_vectors, flat, preferred_element_type=jnp.float32)
  masks = masks.reshape(b, m, k, rows, s // rows, 2, 2, 2, 2)
  masks = masks.transpose(0, 1, 2, 3, 5, 7, 4, 6, 8)  # [B, M, K, y, 2, 2, x, 2, 2]
  return masks.reshape(b, m, k, rows * 4, s // rows * 4)


class MaskDecoder(nnx.Module):
  """Image cells and prompt embeddings -> mask vectors, pixels, IoU and object scores (MaskDecoder).

  Tokens: object score, IoU, masks 0 to 3, then the sparse prompt.
  """

  def __init__(self, config: Sam2Config, rngs: nnx.Rngs):
    d = config.d_model
    num_masks = 1 + config.num_multimask_outputs
    self.transformer = TwoWayTransformer(
      d, config.decoder_num_heads, config.decoder_mlp_dim, config.decoder_depth, rngs
    )
    self.obj_score_token = Tokens(1, d, rngs)
    self.iou_token = Tokens(1, d, rngs)
    self.mask_tokens = Tokens(num_masks, d, rngs)
    self.conv_s0 = Linear(d, d // 8, rngs=rngs)
    self.conv_s1 = Linear(d, d // 4, rngs=rngs)
    self.output_upscaling = nnx.List(
      [UpConv(d, d // 4, rngs), LayerNorm(d // 4, NORM_EPS, rngs), UpConv(d // 4, d // 8, rngs)]
    )
    relu = jax.nn.relu
    self.output_hypernetworks_mlps = nnx.List(
      [MLP((d, d, d, d // 8), relu, rngs=rngs) for _ in range(num_masks)]
    )
    hidden = config.iou_head_hidden_dim
    self.iou_prediction_head = MLP((d, hidden, hidden, num_masks), relu, rngs=rngs)
    self.pred_obj_score_head = MLP((d, d, d, 1), relu, rngs=rngs)

  def project_high_res(
    self, stride4: Float[Array, "B Y4 X4 D"], stride8: Float[Array, "B Y8 X8 D"]
  ) -> HighResFeatures:
    """conv_s0 and conv_s1, once an image. They are the decoder's, so they train with it."""
    return HighResFeatures(s1=cells_2x(self.conv_s1(stride8)), s0=cells_4x(self.conv_s0(stride4)))

  def __call__(
    self,
    image: Float[Array, "B *M S D"],
    image_pe: Float[Array, "S D"],
    high_res: HighResFeatures,
    sparse: Float[Array, "B M K D"],
  ) -> DecodedTokens:
    """`image` includes the dense prompt; without an M axis it is shared by the image's objects."""
    dtype = image.dtype
    learned = [self.obj_score_token, self.iou_token, self.mask_tokens]
    own = jnp.concatenate([t.weight[...] for t in learned]).astype(dtype)
    own = jnp.broadcast_to(own, (*sparse.shape[:2], *own.shape))
    tokens = jnp.concatenate([own, sparse.astype(dtype)], axis=2)
    tokens, image = self.transformer(tokens, image, image_pe.astype(dtype))

    up1, norm, up2 = self.output_upscaling
    pixels = gelu_exact(norm(up1(image) + high_res.s1[:, None]))
    pixels = gelu_exact(up2(pixels) + high_res.s0[:, None])

    mlps = self.output_hypernetworks_mlps
    mask_tokens = tokens[:, :, FIRST_MASK_TOKEN : FIRST_MASK_TOKEN + len(mlps)]
    iou_logits = self.iou_prediction_head(tokens[:, :, 1]).astype(jnp.float32)
    return DecodedTokens(
      pixels=pixels,
      mask_vectors=_one_each(mlps, mask_tokens),
      iou_pred=jax.nn.sigmoid(iou_logits),
      object_score_logits=self.pred_obj_score_head(tokens[:, :, 0])[..., 0].astype(jnp.float32),
    )
