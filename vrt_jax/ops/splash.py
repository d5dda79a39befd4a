"""Attention on TPUs through JAX's splash kernel, whose scores never leave the chip's fast memory.

Kernels are not divided by the compiler, so each device runs its own on its part of batch and heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int32

from vrt_jax.ops.sharding import TENSOR_AXIS, ambient_mesh, batch_axes

LANES = 128
MIN_BLOCK = 512
MAX_BLOCK = 1024
RESIDUALS = "attention"
"""Name of what the backward pass needs, for rematerialisation policies."""


def block_of(length: int, largest: int = MAX_BLOCK) -> int:
  """The largest multiple of 128 up to `largest` that divides `length`, itself a multiple of 128."""
  return max(b for b in range(LANES, largest + 1, LANES) if length % b == 0)


def kernel_length(length: int, largest: int = MAX_BLOCK) -> int:
  """The length to which one is padded: the next multiple of 128 with blocks of `MIN_BLOCK`.

  5920 would make 47 blocks of 128; 6144 makes 6 of 1024 or, where 512 is the `largest`, 12 of 512.
  """
  length += -length % LANES
  while block_of(length, largest) < min(length, MIN_BLOCK):
    length += LANES
  return length


def splash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  q_segments: Int32[Array, "B T"] | None,
  kv_segments: Int32[Array, "B S"] | None,
  causal: bool,
  *,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """softmax(q k^T / sqrt(H)) v within equal segments; `causal`: query i looks at keys 0 .. i.

  Lengths are padded by an own segment (`kernel_length`). `interpret` runs the kernel off TPU.
  """
  if q_segments is None or kv_segments is None:
    q_segments, kv_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
  kind = splash_attention.CausalMask if causal else splash_attention.FullMask
  return _splash(q, k, v, q_segments, kv_segments, kind, interpret)


def packed_splash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  prompt_mask: Bool[Array, "B P"],
  group_size: int,
  *,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Attention in packed sequences (`ops.group_attention.PackedMask`) in one kernel call.

  Blocks between different completions are skipped. Blocks are small, since masks of those at the
  borders are kept in fast memory too.
  """
  prompt = prompt_mask.shape[1]
  run = (q.shape[1] - prompt) // group_size
  segments = jnp.pad(
    prompt_mask.astype(jnp.int32), ((0, 0), (0, group_size * run)), constant_values=1
  )
  kind = partial(PackedBlocks, prompt=prompt, run=run)
  return _splash(q, k, v, segments, segments, kind, interpret, MIN_BLOCK)


@dataclass(frozen=True)
class PackedBlocks(splash_attention.Mask):
  """The kernel's mask of a packed sequence; its slots of padding look like further runs."""

  size: tuple[int, int]
  prompt: int
  run: int

  @property
  def shape(self) -> tuple[int, int]:
    """Queries and keys."""
    return self.size

  def __getitem__(self, index: tuple[slice, slice]) -> Bool[np.ndarray, "T S"]:
    q, kv = (np.arange(n)[i] for n, i in zip(self.size, index, strict=True))
    q, kv = q[:, None], kv[None]
    same_run = (q - self.prompt) // self.run == (kv - self.prompt) // self.run
    return (kv <= q) & ((kv < self.prompt) | same_run)


def _splash(
  q: Array,
  k: Array,
  v: Array,
  q_segments: Array,
  kv_segments: Array,
  kind: Callable[[tuple[int, int]], splash_attention.Mask],
  interpret: bool,
  largest_block: int = MAX_BLOCK,
) -> Array:
  t, s = q.shape[1], k.shape[1]
  q, k, v = ((x * f).swapaxes(1, 2) for x, f in ((q, q.shape[-1] ** -0.5), (k, 1), (v, 1)))
  more_q, more_kv = (kernel_length(n, largest_block) - n for n in (t, s))
  q, q_segments = _padded(q, q_segments, more_q)
  k, kv_segments = _padded(k, kv_segments, more_kv)
  v = jnp.pad(v, ((0, 0), (0, 0), (0, more_kv), (0, 0)))

  def local(q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> Array:
    kernel = _kernel(q.shape[1], kind((q.shape[2], k.shape[2])), interpret, largest_block)
    segments = splash_attention.SegmentIds(q_segments, kv_segments)
    return jax.vmap(kernel)(q, k, v, segments)

  mesh = ambient_mesh()
  if mesh is not None:
    parts = mesh.shape[TENSOR_AXIS]
    tensor = TENSOR_AXIS if k.shape[1] % parts == 0 else None
    rows = batch_axes(mesh, q.shape[0])
    heads, segments = PartitionSpec(rows, tensor), PartitionSpec(rows)
    local = jax.shard_map(
      local,
      in_specs=(heads, heads, heads, segments, segments),
      out_specs=heads,
      check_vma=False,
    )
  out = local(q, k, v, q_segments, kv_segments)
  return out[:, :, :t].swapaxes(1, 2)


def _padded(x: Array, segments: Array, pad: int) -> tuple[Array, Array]:
  return (
    jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))),
    jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1),
  )


def _kernel(
  num_heads: int, head_mask: splash_attention.Mask, interpret: bool, largest_block: int
) -> Callable[..., Array]:
  mask = splash_attention.MultiHeadMask([head_mask] * num_heads)
  q, kv = (block_of(length, largest_block) for length in head_mask.shape)
  sizes = splash_attention.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=kv,
    use_fused_bwd_kernel=True,
  )
  return splash_attention.make_splash_mha_single_device(
    mask, block_sizes=sizes, residual_checkpoint_name=RESIDUALS, interpret=interpret
  )
