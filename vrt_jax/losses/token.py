"""Language-model losses on hidden states; the [B, T, V] logits never exist as a whole."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from vrt_jax.types import IGNORE_INDEX

LOGIT_BYTES = 64 * 2**20
"""Target size of one chunk of float32 logits."""


def token_logps(
  hidden: Float[Array, "B T D"], head: Float[Array, "V D"], tokens: Int32[Array, "B T"]
) -> Float[Array, "B T"]:
  """log p(tokens[t] | hidden[t]) in float32.

  `hidden` is the output of the final norm, `head` the output embedding. Chunks of positions are
  mapped one after the other and recomputed in the backward pass.
  """
  b, t, d = hidden.shape
  rows = b * t
  chunk = max(8, min(rows, LOGIT_BYTES // (4 * head.shape[0])))
  num_chunks = -(-rows // chunk)
  pad = num_chunks * chunk - rows
  flat = jnp.pad(hidden.reshape(rows, d), ((0, pad), (0, 0))).reshape(num_chunks, chunk, d)
  ids = jnp.pad(tokens.reshape(rows), (0, pad)).reshape(num_chunks, chunk)

  @jax.checkpoint
  def chunk_logps(xs: tuple[Array, Array]) -> Array:
    x, token = xs
    logits = jnp.einsum("td,vd->tv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)

  return jax.lax.map(chunk_logps, (flat, ids)).reshape(-1)[:rows].reshape(b, t)


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
