"""Which queries look at which keys, without a [T, S] array until a kernel needs a part of it."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Int32

MASKED = -1e30
"""Score of a key that a query may not look at."""


class AttentionMask(struct.PyTreeNode):
  """Who may look at whom: equal non-zero segments and, where `causal`, no later slot.

  Keys of segment 0 are padding. Queries of segment 0 give rows without meaning (finite).
  """

  q_segments: Int32[Array, "B T"]
  kv_segments: Int32[Array, "B S"]
  q_slots: Int32[Array, "T"] | None = None
  """Slot of each query in key order; with it attention is causal: key slot <= query slot."""
  from_start: bool = struct.field(pytree_node=False, default=False)
  """Whether query i is known to have slot i and padding to come last, so that a kernel may skip
  blocks and causality alone keeps tokens from looking at padding."""

  @classmethod
  def causal(
    cls, q_segments: Int32[Array, "B T"], kv_segments: Int32[Array, "B S"]
  ) -> "AttentionMask":
    """Query i looks at keys 0 .. i of its segment; a row is one segment and padding after it."""
    return cls(q_segments, kv_segments, jnp.arange(q_segments.shape[1]), from_start=True)

  def chunk(self, start: ArrayLike, size: int) -> "AttentionMask":
    """The mask of queries start .. start + size - 1."""
    slots = self.q_slots
    return self.replace(
      q_segments=jax.lax.dynamic_slice_in_dim(self.q_segments, start, size, axis=1),
      q_slots=None if slots is None else jax.lax.dynamic_slice_in_dim(slots, start, size),
    )

  def padded(self, count: int) -> "AttentionMask":
    """The mask with `count` more queries, which are padding."""
    slots = self.q_slots
    return self.replace(
      q_segments=jnp.pad(self.q_segments, ((0, 0), (0, count))),
      q_slots=None if slots is None else jnp.pad(slots, (0, count)),
    )

  def row(self, index: ArrayLike) -> "AttentionMask":
    """The mask of one row of the batch."""
    q, kv = self.q_segments, self.kv_segments
    return self.replace(
      q_segments=jax.lax.dynamic_slice_in_dim(q, index, 1),
      kv_segments=jax.lax.dynamic_slice_in_dim(kv, index, 1),
    )

  def dense(self) -> Bool[Array, "B 1 1 T S"]:
    """True where a query may look at a key."""
    q, kv = self.q_segments[:, :, None], self.kv_segments[:, None, :]
    allowed = (q == kv) & (kv > 0)
    if self.q_slots is not None:
      allowed &= jnp.arange(self.kv_segments.shape[1])[None, None, :] <= self.q_slots[None, :, None]
    return allowed[:, None, None]
