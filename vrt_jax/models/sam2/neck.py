"""The feature pyramid neck of SAM 2 (sam2 backbones/image_encoder.py FpnNeck and ImageEncoder)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from vrt_jax.config import Sam2Config
from vrt_jax.models.layers import Linear
from vrt_jax.models.sam2.hiera import Hiera


def upsample_nearest_2x(x: Float[Array, "B Y X D"]) -> Float[Array, "B 2*Y 2*X D"]:
  """Every cell becomes a 2x2 block."""
  b, y, x_size, d = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, y, 2, x_size, 2, d))
  return x.reshape(b, 2 * y, 2 * x_size, d)


class FpnNeck(nnx.Module):
  """Trunk maps of strides 4, 8, 16, 32 -> maps of strides 4, 8, 16, all of width D (FpnNeck).

  Only stride 16 gets a top-down sum (from stride 32); the stride-32 map itself is dropped.
  """

  def __init__(self, config: Sam2Config, rngs: nnx.Rngs):
    widths = [config.embed_dim * 2**stage for stage in reversed(range(len(config.stages)))]
    self.convs = nnx.List([Linear(width, config.d_model, rngs=rngs) for width in widths])

  def __call__(self, maps: list[Float[Array, "B _ _ _"]]) -> list[Float[Array, "B _ _ D"]]:
    levels = [conv(x) for conv, x in zip(self.convs, reversed(maps), strict=True)]
    stride32, stride16, stride8, stride4 = levels
    return [stride4, stride8, stride16 + upsample_nearest_2x(stride32)]


class ImageEncoder(nnx.Module):
  """Normalised images [B, Y, X, 3] -> pyramid maps of strides 4, 8, 16 (sam2 ImageEncoder)."""

  def __init__(self, config: Sam2Config, rngs: nnx.Rngs):
    self.trunk = Hiera(config, rngs)
    self.neck = FpnNeck(config, rngs)

  def __call__(self, image: Float[Array, "B Y X 3"]) -> list[Float[Array, "B _ _ D"]]:
    return self.neck(self.trunk(image))
