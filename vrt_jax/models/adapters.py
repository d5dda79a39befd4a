"""Low-rank adapters of linear layers, and the dropout of what they read."""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Key

from vrt_jax.config import LoraConfig
from vrt_jax.models.layers import Axes, Linear, param
from vrt_jax.ops.linear import low_rank
from vrt_jax.ops.random_bits import random_bits
from vrt_jax.ops.sharding import constrain_batch

LINEAR = "linear"
"""Name of the sum that an adapted layer gives, for rematerialisation policies."""


class Dropout(struct.PyTreeNode):
  """Inverted dropout with a mask that is drawn already."""

  keep: Bool[Array, "*B D"]
  keep_share: float = struct.field(pytree_node=False)

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return jnp.where(self.keep, x / self.keep_share, 0).astype(x.dtype)


def draw_dropouts(
  key: Key[Array, ""], shape: tuple[int, ...], rate: float, count: int
) -> list[Dropout]:
  """`count` (1 to 4) independent dropouts of arrays of one shape [B, .., D].

  They share a random word an element, of which each takes 16 bits or, where there are more than
  two, 32 // count. The rate is rounded to them: 0.0498 instead of 0.05 for three. Drawn once and
  kept as a byte an element, since XLA would draw again in every operation that uses a mask.
  """
  width = min(16, 32 // count)
  dropped = round(rate * 2**width)

  def kept(words: Array) -> Array:
    fields = [(words >> (n * width)) & (2**width - 1) for n in range(count)]
    return sum((field >= dropped).astype(jnp.uint8) << n for n, field in enumerate(fields))

  flags = random_bits(key, shape, jnp.uint16 if count == 1 else jnp.uint32, kept)
  flags = jax.lax.optimization_barrier(constrain_batch(flags))
  keep_share = 1 - dropped / 2**width
  return [Dropout((flags >> n) & 1 == 1, keep_share) for n in range(count)]


class LoraLinear(Linear):
  """Linear plus the low-rank update (alpha / rank) B A dropout(x) (Hu et al., arXiv 2106.09685).

  A starts Kaiming-uniform (a = sqrt 5, as in PEFT), B at zero. Rank 0 makes a plain Linear.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    axes: Axes = (None, None),
    head_dim: int | None = None,
    lora: LoraConfig,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, out_features, bias=False, axes=axes, head_dim=head_dim, rngs=rngs)
    self.lora = lora
    if lora.rank:
      uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
      zeros = nnx.initializers.zeros
      self.lora_a = param(rngs, (lora.rank, in_features), uniform, ("lora", axes[1]), nnx.LoRAParam)
      self.lora_b = param(rngs, (out_features, lora.rank), zeros, (axes[0], "lora"), nnx.LoRAParam)

  def __call__(
    self, x: Float[Array, "*B in"], dropout: Dropout | None = None
  ) -> Float[Array, "*B_out"]:
    """`dropout` is that of the low-rank update (training)."""
    y = super().__call__(x)
    if not self.lora.rank:
      return checkpoint_name(y, LINEAR)
    if dropout is not None:
      x = dropout(x)
    down = checkpoint_name(low_rank(x, self.lora_a[...].astype(x.dtype)), LINEAR)
    up = low_rank(down, self._by_heads(self.lora_b[...].astype(x.dtype)))
    return checkpoint_name(y + up * (self.lora.alpha / self.lora.rank), LINEAR)
