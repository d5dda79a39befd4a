"""The two-way transformer of SAM 2's mask decoder.

Tokens are per object, [B, M, T, D]. The image side starts shared by all objects of an image,
[B, S, D] with S = y * x cells, and becomes [B, M, S, D] where the first block lets it look at
the tokens; whatever precedes that point is computed once an image.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from vrt_jax.models.layers import LayerNorm, Linear

NORM_EPS = 1e-5


class MLP(nnx.Module):
  """(.., sizes[0]) -> (.., sizes[-1]): linear layers with an activation between (sam2 MLP).

  `axes` are the logical names of the sizes.
  """

  def __init__(
    self,
    sizes: tuple[int, ...],
    activation: Callable[[Array], Array],
    *,
    axes: tuple[str, ...] | None = None,
    rngs: nnx.Rngs,
  ):
    names = axes or (None,) * len(sizes)
    pairs = zip(itertools.pairwise(sizes), itertools.pairwise(names), strict=True)
    self.layers = nnx.List([Linear(a, b, axes=(n, m), rngs=rngs) for (a, b), (m, n) in pairs])
    self.activation = activation

  def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
    for layer in self.layers[:-1]:
      x = self.activation(layer(x))
    return self.layers[-1](x)


class Attention(nnx.Module):
  """q [B, (M), T, D], k and v [B, (M), S, D] -> [B, M, T, D] (sam2 sam/transformer.py Attention).

  The object axis M may be missing on one side, which is then shared by all objects.
  """

  def __init__(self, features: int, num_heads: int, downsample: int, rngs: nnx.Rngs):
    inner = features // downsample
    self.num_heads = num_heads
    self.q_proj = Linear(features, inner, rngs=rngs)
    self.k_proj = Linear(features, inner, rngs=rngs)
    self.v_proj = Linear(features, inner, rngs=rngs)
    self.out_proj = Linear(inner, features, rngs=rngs)

  def _heads(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.num_heads, -1)

  def __call__(self, q: Array, k: Array, v: Array) -> Float[Array, "B M T D"]:
    q, k, v = self._heads(self.q_proj(q)), self._heads(self.k_proj(k)), self._heads(self.v_proj(v))
    q_axes = "bmtnh" if q.ndim == 5 else "btnh"
    k_axes = "bmsnh" if k.ndim == 5 else "bsnh"
    scores = jnp.einsum(f"{q_axes},{k_axes}->bmnts", q, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum(f"bmnts,{k_axes}->bmtnh", probs, v)
    return self.out_proj(out.reshape(*out.shape[:3], -1))


def _with_objects(image: Array) -> Array:
  """[B, S, D] -> [B, 1, S, D]; [B, M, S, D] stays."""
  return image if image.ndim == 4 else image[:, None]


class TwoWayBlock(nnx.Module):
  """Tokens [B, M, T, D], image [B, (M), S, D] -> both with M (sam2 TwoWayAttentionBlock).

  Self-attention of the tokens, tokens to image, MLP, image to tokens; norms follow each sum. The
  first block's self-attention replaces the tokens and sees no positions.
  """

  def __init__(self, features: int, num_heads: int, mlp_dim: int, first: bool, rngs: nnx.Rngs):
    self.first = first
    self.self_attn = Attention(features, num_heads, 1, rngs)
    self.norm1 = LayerNorm(features, NORM_EPS, rngs)
    self.cross_attn_token_to_image = Attention(features, num_heads, 2, rngs)
    self.norm2 = LayerNorm(features, NORM_EPS, rngs)
    self.mlp = MLP((features, mlp_dim, features), jax.nn.relu, rngs=rngs)
    self.norm3 = LayerNorm(features, NORM_EPS, rngs)
    self.norm4 = LayerNorm(features, NORM_EPS, rngs)
    self.cross_attn_image_to_token = Attention(features, num_heads, 2, rngs)

  def __call__(
    self,
    tokens: Float[Array, "B M T D"],
    image: Float[Array, "B *M S D"],
    token_pe: Float[Array, "B M T D"],
    image_pe: Float[Array, "S D"],
  ) -> tuple[Float[Array, "B M T D"], Float[Array, "B M S D"]]:
    if self.first:
      tokens = self.self_attn(tokens, tokens, tokens)
    else:
      q = tokens + token_pe
      tokens = tokens + self.self_attn(q, q, tokens)
    tokens = self.norm1(tokens)
    located = image + image_pe
    tokens = tokens + self.cross_attn_token_to_image(tokens + token_pe, located, image)
    tokens = self.norm2(tokens)
    tokens = self.norm3(tokens + self.mlp(tokens))
    update = self.cross_attn_image_to_token(located, tokens + token_pe, tokens)
    return tokens, self.norm4(_with_objects(image) + update)


class TwoWayTransformer(nnx.Module):
  """Prompt tokens and image cells attend to each other (sam2 sam/transformer.py)."""

  def __init__(self, features: int, num_heads: int, mlp_dim: int, depth: int, rngs: nnx.Rngs):
    self.layers = nnx.List(
      [TwoWayBlock(features, num_heads, mlp_dim, i == 0, rngs) for i in range(depth)]
    )
    self.final_attn_token_to_image = Attention(features, num_heads, 2, rngs)
    self.norm_final_attn = LayerNorm(features, NORM_EPS, rngs)

  def __call__(
    self,
    tokens: Float[Array, "B M T D"],
    image: Float[Array, "B *M S D"],
    image_pe: Float[Array, "S D"],
  ) -> tuple[Float[Array, "B M T D"], Float[Array, "B M S D"]]:
    """The input tokens also serve as their own positions in every block."""
    token_pe = tokens
    for layer in self.layers:
      tokens, image = layer(tokens, image, token_pe, image_pe)
    update = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
    return self.norm_final_attn(tokens + update), image
