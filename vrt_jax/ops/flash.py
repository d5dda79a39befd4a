"""Attention on GPUs through cuDNN's flash kernels, whose scores never reach the GPU's memory.

They know keys that all count, keys up to a row's length, and causality from the first key on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.sharding import platform

DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 128
MIN_TOKENS = 128
"""Measured to be faster than scores in memory on an H100 at 196 (a window of SAM 2) to 1024."""

Attention = Callable[[Array, Array, Array], Array]


def flash_knows(q: Array) -> bool:
  """Whether the program is for a GPU with kernels that know such queries and are worth it.

  NVIDIA's from compute capability 8.0 on (A100) have them.
  """
  t, h = q.shape[1], q.shape[-1]
  fits = q.dtype in DTYPES and h <= MAX_HEAD_DIM and h % 8 == 0
  return platform() == "gpu" and t >= MIN_TOKENS and fits and compute_capability() >= 8


def compute_capability() -> float:
  """Of this process's GPUs; 0 where they are no NVIDIA's."""
  try:
    return float(jax.local_devices()[0].compute_capability)
  except (AttributeError, ValueError):
    return 0.0


def flash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: AttentionMask | None,
  otherwise: Attention,
) -> Float[Array, "B T N H"]:
  """softmax(q k^T / sqrt(H)) v; `otherwise` computes it where the mask is none that cuDNN knows.

  Where segments are 1 for the first keys of a row and 0 for the others, as with one picture a row,
  it is a matter of their number, which is seen when the program runs.
  """
  if mask is None or (mask.from_start and q.shape[1] == k.shape[1]):
    return _cudnn(q, k, v, is_causal=mask is not None)
  if mask.q_slots is not None:
    return otherwise(q, k, v)
  lengths = jnp.sum(mask.kv_segments > 0, axis=1, dtype=jnp.int32)
  prefix = (jnp.arange(k.shape[1]) < lengths[:, None]).astype(mask.kv_segments.dtype)
  return jax.lax.cond(
    jnp.all(mask.kv_segments == prefix) & jnp.all(mask.q_segments <= 1),
    lambda q, k, v: _cudnn(q, k, v, key_value_seq_lengths=jnp.maximum(lengths, 1)),
    otherwise,
    q,
    k,
    v,
  )


def packed_flash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  prompt_mask: Bool[Array, "B P"],
  group_size: int,
) -> Float[Array, "B T N H"]:
  """Attention in packed sequences (`ops.group_attention.PackedMask`), prompts padded at their end.

  Every completion goes behind its own copy of the prompt's tokens, where causality is all the mask
  there is. Prompts attend once a completion, which is cheaper than scores in memory.
  """
  b, t = q.shape[:2]
  prompt = prompt_mask.shape[1]
  run = (t - prompt) // group_size
  starts = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)

  def behind(prompt: Array, run: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(prompt, run, start, axis=0)

  def rows(x: Array) -> Array:  # [B, T, N, H] -> [B * G, P + run, N, H]
    prompts = jnp.pad(x[:, :prompt], ((0, 0), (0, run), (0, 0), (0, 0)))
    runs = x[:, prompt:].reshape(b, group_size, run, *x.shape[2:])
    whole = jax.vmap(jax.vmap(behind, (None, 0, None)))(prompts, runs, starts)
    return whole.reshape(-1, prompt + run, *x.shape[2:])

  def run_of(row: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(row, start, run, axis=0)

  out = _cudnn(*map(rows, (q, k, v)), is_causal=True)
  out = out.reshape(b, group_size, prompt + run, *q.shape[2:])
  runs = jax.vmap(jax.vmap(run_of, (0, None)))(out, starts).reshape(b, -1, *q.shape[2:])
  return jnp.concatenate([out[:, 0, :prompt], runs], axis=1)


def _cudnn(q: Array, k: Array, v: Array, **kind: Any) -> Array:
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **kind)
