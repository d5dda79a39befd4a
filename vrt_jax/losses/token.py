"""Language-model losses on hidden states; the [B, T, V] logits never exist as a whole."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from vrt_jax.ops.sharding import constrain_batch, gathered, rows_per_device
from vrt_jax.types import IGNORE_INDEX

LOGIT_BYTES = 128 * 2**20
"""Target size of one chunk of float32 logits on a device."""
MIN_CHUNK = 8


def token_logps(
  hidden: Float[Array, "B T D"], head: Float[Array, "V D"], tokens: Int32[Array, "B T"]
) -> Float[Array, "B T"]:
  """log p(tokens[t] | hidden[t]) in float32.

  `hidden` is the output of the final norm, `head` the output embedding. Chunks of positions are
  mapped one after the other and recomputed in the backward pass; the batch stays divided over the
  mesh, and the head is gathered once.
  """
  b, t, _ = hidden.shape
  chunk = min(t, max(MIN_CHUNK, LOGIT_BYTES // (4 * head.shape[0] * rows_per_device(b))))
  num_chunks = -(-t // chunk)
  chunk = -(-t // num_chunks)
  pad = num_chunks * chunk - t
  head = gathered(head.astype(hidden.dtype), tensor_axis=0)

  def chunks(x: Array) -> Array:
    """[B, T, ..] -> [chunks, B, Tc, ..]."""
    x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
    x = jnp.moveaxis(x.reshape(b, num_chunks, chunk, *x.shape[2:]), 1, 0)
    return constrain_batch(x, axis=1)

  @jax.checkpoint
  def chunk_logps(xs: tuple[Array, Array]) -> Array:
    x, token = xs
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)

  logps = jax.lax.map(chunk_logps, (chunks(hidden), chunks(tokens)))  # [chunks, B, Tc]
  return jnp.moveaxis(logps, 0, 1).reshape(b, -1)[:, :t]


def cross_entropy(
  hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int32[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Next-token cross-entropy as (sum, number of labelled tokens).

  Position t predicts labels[t + 1]; labels of IGNORE_INDEX do not count. The reference (xtuner,
  HF loss) divides the sum by the count over the batch.
  """
  targets = labels[:, 1:]
  counted = targets != IGNORE_INDEX
  logps = token_logps(hidden[:, :-1], head, jnp.where(counted, targets, 0))
  return -jnp.sum(jnp.where(counted, logps, 0.0)), jnp.sum(counted).astype(jnp.float32)
