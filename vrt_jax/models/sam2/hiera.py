"""Hiera, the image trunk of SAM 2 (Ryali et al., arXiv 2306.00989; sam2 backbones/hieradet.py)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from vrt_jax.config import Sam2Config
from vrt_jax.models.layers import (
  LayerNorm,
  Linear,
  gelu_exact,
  in_row_blocks,
  param,
  recomputed,
  whole_weights,
)
from vrt_jax.models.sam2.transformer import MLP
from vrt_jax.ops.attention import attention
from vrt_jax.ops.resize import resize_bicubic
from vrt_jax.ops.sharding import constrain_batch, on_one_cpu

NORM_EPS = 1e-6
PATCH_STRIDE = 4
PATCH_KERNEL = 7


def max_pool_2x2(x: Float[Array, "B Y X D"]) -> Float[Array, "B Y/2 X/2 D"]:
  """Maximum over 2x2 blocks; Y and X are even."""
  b, y, x_size, d = x.shape
  return x.reshape(b, y // 2, 2, x_size // 2, 2, d).max(axis=(2, 4))


def partition_windows(x: Float[Array, "B Y X D"], window: int) -> Float[Array, "BW w w D"]:
  """Square windows as batch, image by image and row by row; zeros fill windows that stick out."""
  b, y, x_size, d = x.shape
  pad_y, pad_x = -y % window, -x_size % window
  if pad_y or pad_x:
    x = jnp.pad(x, ((0, 0), (0, pad_y), (0, pad_x), (0, 0)))
  x = x.reshape(b, (y + pad_y) // window, window, (x_size + pad_x) // window, window, d)
  return x.swapaxes(2, 3).reshape(-1, window, window, d)


def merge_windows(
  windows: Float[Array, "BW w w D"], size: tuple[int, int]
) -> Float[Array, "B Y X D"]:
  """Inverse of `partition_windows` for maps of `size` (rows, columns); the filling is cut off."""
  window, d = windows.shape[1], windows.shape[3]
  rows, columns = -(-size[0] // window), -(-size[1] // window)
  x = windows.reshape(-1, rows, columns, window, window, d).swapaxes(2, 3)
  x = x.reshape(-1, rows * window, columns * window, d)
  return x[:, : size[0], : size[1]]


class PatchEmbed(nnx.Module):
  """[B, Y, X, 3] -> [B, Y/4, X/4, D]: 7x7 convolution, stride 4, padding 3 (sam2 PatchEmbed)."""

  def __init__(self, features: int, rngs: nnx.Rngs):
    shape = (features, 3, PATCH_KERNEL, PATCH_KERNEL)
    init = nnx.initializers.normal((3 * PATCH_KERNEL**2) ** -0.5)
    self.weight = param(rngs, shape, init, (None,) * 4)
    self.bias = param(rngs, (features,), nnx.initializers.zeros, (None,))

  def __call__(self, image: Float[Array, "B Y X 3"]) -> Float[Array, "B Y/4 X/4 D"]:
    weight, bias = self.weight[...].astype(image.dtype), self.bias[...].astype(image.dtype)
    padding = PATCH_KERNEL // 2
    y = jax.lax.conv_general_dilated(
      image,
      weight,
      window_strides=(PATCH_STRIDE, PATCH_STRIDE),
      padding=((padding, padding), (padding, padding)),
      dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    return y + bias


class MultiScaleAttention(nnx.Module):
  """[B, Y, X, D] -> [B, Y', X', D']: attention over one map or window (sam2 MultiScaleAttention).

  With `pool` the queries are max-pooled, so that Y' = Y / 2.
  """

  def __init__(self, features: int, out_features: int, num_heads: int, pool: bool, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.pool = pool
    axes = ("vision_heads", "vision_embed")
    self.qkv = Linear(features, 3 * out_features, axes=axes, rngs=rngs)
    self.proj = Linear(out_features, out_features, axes=axes[::-1], rngs=rngs)

  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Yo Xo Do"]:
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    if self.pool:
      q = max_pool_2x2(q)
    shape = q.shape
    q, k, v = (
      t.reshape(t.shape[0], -1, self.num_heads, t.shape[-1] // self.num_heads) for t in (q, k, v)
    )
    return self.proj(attention(q, k, v).reshape(shape))


class MultiScaleBlock(nnx.Module):
  """[B, Y, X, D] -> [B, Y', X', D'], pre-norm attention and MLP (sam2 MultiScaleBlock).

  A block that changes the width halves the map: its shortcut is maxpool(proj(norm1(x))).
  `window` 0 is global attention.
  """

  def __init__(self, features: int, out_features: int, num_heads: int, window: int, rngs: nnx.Rngs):
    self.window = window
    pool = features != out_features
    self.norm1 = LayerNorm(features, NORM_EPS, rngs)
    self.attn = MultiScaleAttention(features, out_features, num_heads, pool, rngs)
    self.norm2 = LayerNorm(out_features, NORM_EPS, rngs)
    sizes, axes = (out_features, 4 * out_features, out_features), ("vision_embed", "vision_mlp")
    self.mlp = MLP(sizes, gelu_exact, axes=(*axes, axes[0]), rngs=rngs)
    axes = ("vision_heads", "vision_embed")
    self.proj = Linear(features, out_features, axes=axes, rngs=rngs) if pool else None

  def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Yo Xo Do"]:
    h = self.norm1(x)
    shortcut = x if self.proj is None else max_pool_2x2(self.proj(h))
    if self.window:
      _, rows, columns, _ = shortcut.shape
      h = merge_windows(self.attn(partition_windows(h, self.window)), (rows, columns))
    else:
      h = self.attn(h)
    return in_row_blocks(lambda h: h + self.mlp(self.norm2(h)), shortcut + h)


class Hiera(nnx.Module):
  """[B, Y, X, 3] -> maps of strides 4, 8, 16, 32, widths D, 2D, 4D, 8D (sam2 Hiera)."""

  def __init__(self, config: Sam2Config, rngs: nnx.Rngs):
    d = config.embed_dim
    normal = nnx.initializers.normal(0.02)
    background = config.window_pos_embed_background_size
    window = config.window_spec[0]
    self.patch_embed = PatchEmbed(d, rngs)
    self.pos_embed = param(rngs, (1, d, *background), normal, (None,) * 4)
    self.pos_embed_window = param(rngs, (1, d, window, window), normal, (None,) * 4)
    self.stage_ends = tuple(int(end) - 1 for end in np.cumsum(config.stages))
    blocks: list[MultiScaleBlock] = []
    for stage, depth in enumerate(config.stages):
      for i in range(depth):
        before = max(stage - 1, 0) if i == 0 else stage
        is_global = len(blocks) in config.global_attention_blocks
        window = 0 if is_global else config.window_spec[before]
        heads = config.num_heads * 2**stage
        blocks.append(MultiScaleBlock(d * 2**before, d * 2**stage, heads, window, rngs))
    self.blocks = nnx.List(blocks)
    self.runs = _runs([block.proj is not None for block in blocks])

  def positions(self, size: tuple[int, int]) -> Float[Array, "Y X D"]:
    """Bicubic background plus the tiled window embedding, float32."""
    background = resize_bicubic(self.pos_embed[0].astype(jnp.float32), size)
    window = self.pos_embed_window[0].astype(jnp.float32)
    tiled = jnp.tile(window, (1, size[0] // window.shape[1], size[1] // window.shape[2]))
    return jnp.moveaxis(background + tiled, 0, -1)

  def __call__(self, image: Float[Array, "B Y X 3"]) -> list[Float[Array, "B _ _ _"]]:
    x = self.patch_embed(image)
    _, rows, columns, _ = x.shape
    x = x + self.positions((rows, columns)).astype(x.dtype)
    stages = []
    for start, stop in self.runs:
      x = constrain_batch(run_blocks(self.blocks[start:stop], x))
      if stop - 1 in self.stage_ends:
        stages.append(x)
    return stages


def _runs(pools: list[bool]) -> tuple[tuple[int, int], ...]:
  """(start, stop) of blocks that pool, and of the blocks of equal width that follow each."""
  starts = [i for i, pool in enumerate(pools) if i == 0 or pool or pools[i - 1]]
  return tuple(itertools.pairwise([*starts, len(pools)]))


def run_blocks(blocks: list[MultiScaleBlock], x: Float[Array, "B Y X D"]) -> Array:
  """The blocks one after the other; several are a loop, which compiles each window size once.

  Not on CPUs, where a loop would copy every block's weights.
  """
  if on_one_cpu():
    for block in blocks:
      x = block(x)
    return x
  if len(blocks) == 1:
    graphdef, state = nnx.split(blocks[0])

    def run(state: nnx.State, x: Array) -> Array:
      return nnx.merge(graphdef, whole_weights(state))(x)

    return recomputed(run, in_scan=False)(state, x)
  kinds = {block.window: nnx.split(block)[0] for block in blocks}
  branches = [lambda state, x, g=g: nnx.merge(g, state)(x) for g in kinds.values()]
  order = jnp.asarray([list(kinds).index(block.window) for block in blocks])
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[nnx.state(b) for b in blocks])

  def body(x: Array, layer: tuple) -> tuple[Array, None]:
    state, kind = layer
    return jax.lax.switch(kind, branches, state, x), None

  return jax.lax.scan(recomputed(body), x, (whole_weights(stacked), order))[0]
