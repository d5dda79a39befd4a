"""Rotated keys and values that were computed before: of a sequence, and of groups of samples."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Float32

from vrt_jax.config import TextConfig
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.group_attention import group_attention, step_attention
from vrt_jax.ops.sharding import constrain_batch


class KVCache(struct.PyTreeNode):
  """Rotated keys and values of all layers in S slots; unwritten slots hold zeros."""

  k: Float[Array, "L B S K H"]
  v: Float[Array, "L B S K H"]

  @classmethod
  def zeros(
    cls, config: TextConfig, batch_size: int, num_slots: int, dtype: DTypeLike
  ) -> "KVCache":
    """An empty cache."""
    shape = (config.num_layers, batch_size, num_slots, config.num_kv_heads, config.head_dim)
    return cls(_empty(shape, dtype), _empty(shape, dtype))

  def write(
    self, layer: ArrayLike, slot: ArrayLike, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
  ) -> "KVCache":
    """The cache with slots slot .. slot + T - 1 of a layer replaced."""
    start = (layer, 0, slot, 0, 0)
    return KVCache(_replace(self.k, k[None], start), _replace(self.v, v[None], start))

  def read(
    self, layer: ArrayLike, dtype: DTypeLike
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Keys and values of a layer."""
    return _layer(self.k, layer, dtype), _layer(self.v, layer, dtype)

  def attend(
    self, layer: ArrayLike, slot: ArrayLike, q: Float[Array, "B T N H"], mask: AttentionMask | None
  ) -> Float[Array, "B T N H"]:
    """Attention of T queries from slot `slot` on to a layer, whose S slots `mask` covers."""
    return attention(q, *self.read(layer, q.dtype), mask)


class GroupCache(struct.PyTreeNode):
  """What G samples of a prompt look at: the prompt, which is there once, and their own new tokens.

  All samples are at the same number of new tokens, so one query a sample comes at a time.
  """

  prompt: KVCache
  prompt_mask: Bool[Array, "B P"]
  k: Float[Array, "L B G S K H"]
  v: Float[Array, "L B G S K H"]
  slots_read: int | None = struct.field(pytree_node=False, default=None)
  """Only the first so many slots are looked at; None: all S."""

  @classmethod
  def start(
    cls, prompt: KVCache, prompt_mask: Bool[Array, "B P"], group_size: int, num_slots: int
  ) -> "GroupCache":
    """A cache with room for `num_slots` new tokens of each sample."""
    layers, b, _, heads, width = prompt.k.shape
    empty = _empty((layers, b, group_size, num_slots, heads, width), prompt.k.dtype)
    return cls(prompt, prompt_mask, empty, empty)

  def by_layer(self) -> tuple["GroupCache", ...]:
    """A cache of one layer for each."""
    return tuple(
      self.replace(
        prompt=jax.tree.map(lambda x, i=i: x[i : i + 1], self.prompt),
        k=self.k[i : i + 1],
        v=self.v[i : i + 1],
      )
      for i in range(self.k.shape[0])
    )

  def for_cpus(self) -> tuple["LayerCache", ...]:
    """The same, each layer by itself; new keys and values are float32.

    CPUs would convert an array of 16 bits as a whole to write a slot of it.
    """
    # without the barrier the prompt is brought into order inside the loop over tokens, at each
    prompt_k, prompt_v = jax.lax.optimization_barrier(
      [jnp.moveaxis(x, 2, -1) for x in (self.prompt.k, self.prompt.v)]
    )

    def own(x: Float[Array, "B G S K H"]) -> Float[Array, "BGK H S"]:
      x = x.astype(jnp.float32)
      return jnp.moveaxis(x, 2, -1).reshape(-1, x.shape[-1], x.shape[2])

    return tuple(
      LayerCache(prompt_k[i], prompt_v[i], self.prompt_mask, own(self.k[i]), own(self.v[i]))
      for i in range(self.k.shape[0])
    )

  def write(
    self, layer: ArrayLike, slot: ArrayLike, k: Float[Array, "B G K H"], v: Float[Array, "B G K H"]
  ) -> "GroupCache":
    """The cache with one slot of every sample replaced in a layer."""
    start = (layer, 0, 0, slot, 0, 0)
    return self.replace(
      k=_replace(self.k, k[None, :, :, None], start), v=_replace(self.v, v[None, :, :, None], start)
    )

  def attend(
    self, layer: ArrayLike, slot: ArrayLike, q: Float[Array, "B G N H"], mask: object = None
  ) -> Float[Array, "B G N H"]:
    """Attention of one query a sample, of new slot `slot`.

    The cache itself knows what it may look at: there is no `mask`.
    """
    _, b, g, size, heads, width = self.k.shape
    shape = (1, b, g, self.slots_read or size, heads, width)
    start = (layer, 0, 0, 0, 0, 0)
    k, v = (jax.lax.dynamic_slice(x, start, shape)[0].astype(q.dtype) for x in (self.k, self.v))
    prompt = self.prompt.read(layer, q.dtype)
    slots = jnp.reshape(slot, 1)
    return group_attention(q[:, :, None], *prompt, self.prompt_mask, k, v, slots)[:, :, 0]


class LayerCache(struct.PyTreeNode):
  """A `GroupCache` of one layer, as `step_attention` reads it.

  A sample's heads count as rows: with axes of their own, XLA's CPU compiler, which drops those of
  length one, would write the new slot once for attention and once for the next token, and copy the
  array for that at every token.
  """

  prompt_k: Float[Array, "B K H P"]
  prompt_v: Float[Array, "B K H P"]
  prompt_mask: Bool[Array, "B P"]
  k: Float32[Array, "BGK H S"]
  v: Float32[Array, "BGK H S"]

  def write(
    self, layer: ArrayLike, slot: ArrayLike, k: Float[Array, "B G K H"], v: Float[Array, "B G K H"]
  ) -> "LayerCache":
    """As of GroupCache."""
    k, v = (x.reshape(-1, x.shape[-1], 1) for x in (k, v))
    start = (0, 0, slot)
    return self.replace(k=_replace(self.k, k, start), v=_replace(self.v, v, start))

  def attend(
    self, layer: ArrayLike, slot: ArrayLike, q: Float[Array, "B G N H"], mask: object = None
  ) -> Float[Array, "B G N H"]:
    """As of GroupCache."""
    prompt = self.prompt_k, self.prompt_v, self.prompt_mask
    return step_attention(q, *prompt, self.k, self.v, slot)


def _empty(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
  """Zeros [L, B, ..] with the batch divided over the mesh: no device holds all rows' cache."""
  return constrain_batch(jnp.zeros(shape, dtype), axis=1, others=PartitionSpec.UNCONSTRAINED)


def _replace(cache: Array, new: Array, start: tuple[ArrayLike, ...]) -> Array:
  return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), start)


def _layer(cache: Array, layer: ArrayLike, dtype: DTypeLike) -> Array:
  return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False).astype(dtype)
