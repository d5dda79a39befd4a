"""Attention on TPUs through JAX's splash kernel, whose scores never leave the chip's fast memory.

Kernels are not divided by the compiler, so each device runs its own on its part of batch and heads.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int32

from vrt_jax.ops.sharding import TENSOR_AXIS, ambient_mesh, batch_axes

LANES = 128
MAX_BLOCK = 1024
RESIDUALS = "attention"
"""Name of what the backward pass needs, for rematerialisation policies."""


def block_of(length: int) -> int:
  """The largest multiple of 128 up to 1024 that divides `length`, itself a multiple of 128."""
  return max(b for b in range(LANES, MAX_BLOCK + 1, LANES) if length % b == 0)


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

  Lengths are padded to multiples of 128 by an own segment. `interpret` runs the kernel off TPU.
  """
  t, s = q.shape[1], k.shape[1]
  if q_segments is None:
    q_segments, kv_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
  q, k, v = ((x * f).swapaxes(1, 2) for x, f in ((q, q.shape[-1] ** -0.5), (k, 1), (v, 1)))
  q, q_segments = _padded(q, q_segments, -t % LANES)
  k, kv_segments = _padded(k, kv_segments, -s % LANES)
  v = jnp.pad(v, ((0, 0), (0, 0), (0, -s % LANES), (0, 0)))

  def local(q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> Array:
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], causal, interpret)
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


def _kernel(num_heads: int, t: int, s: int, causal: bool, interpret: bool):
  kind = splash_attention.CausalMask if causal else splash_attention.FullMask
  mask = splash_attention.MultiHeadMask([kind((t, s))] * num_heads)
  q, kv = block_of(t), block_of(s)
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
