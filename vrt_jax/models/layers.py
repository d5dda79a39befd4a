"""Linear, norm and embedding layers shared by all models.

Weights are stored (out, in) as in PyTorch: a matrix-vector product then reads rows that lie
together in memory, and conversion needs no transpose. A parameter carries the logical names of
its axes as `axes` metadata; `vrt_jax.runtime` maps them to mesh axes.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int32

from vrt_jax.ops.linear import linear
from vrt_jax.ops.sharding import (
  FSDP_AXIS,
  ambient_mesh,
  divides_weights,
  on_one_cpu,
  platform,
)
from vrt_jax.ops.splash import RESIDUALS
from vrt_jax.runtime import mesh_axes

Axes = tuple[str | None, ...]
M = TypeVar("M", bound=nnx.Module)

GATHERED = "gathered_weights"
ROW_BLOCK = 1024
KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


class ShapeRngs(nnx.Rngs):
  """Stands for random numbers where only shapes are wanted: parameters start as zeros.

  Tracing the initialisers of a large model takes several times as long as tracing zeros.
  """

  def __init__(self) -> None:
    super().__init__(0)


def param(
  rngs: nnx.Rngs, shape: tuple[int, ...], init: Callable, axes: Axes, kind: type = nnx.Param
) -> nnx.Param:
  """A float32 parameter of `shape` whose `axes` metadata names each dimension."""
  assert len(shape) == len(axes), (shape, axes)
  if isinstance(rngs, ShapeRngs):
    return kind(jnp.zeros(shape, jnp.float32), axes=axes)
  return kind(init(rngs.params(), shape, jnp.float32), axes=axes)


def whole_weights(state: nnx.State) -> nnx.State:
  """Parameters whose parts on the fsdp axis are brought together, as their module is about to run.

  Their gradients are divided again as they are summed. Without such a mesh nothing happens. Named
  `GATHERED`, so that a layer's whole weights are not kept for the backward pass.
  """
  mesh = ambient_mesh()
  if mesh is None or not divides_weights():
    return state

  def gather(variable: nnx.Variable) -> nnx.Variable:
    value = variable.get_value()
    axes = variable.get_metadata().get("axes", (None,) * value.ndim)
    names = mesh_axes(axes, value.shape, mesh.shape)
    if FSDP_AXIS not in names:
      return variable
    return variable.replace(_gather(value, PartitionSpec(*names)))

  return jax.tree.map(gather, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(value: Array, spec: PartitionSpec) -> Array:
  whole = PartitionSpec(*[None if name == FSDP_AXIS else name for name in spec])
  return checkpoint_name(jax.lax.with_sharding_constraint(value, whole), GATHERED)


_gather.defvjp(
  lambda value, spec: (_gather(value, spec), None),
  lambda spec, _, gradient: (jax.lax.with_sharding_constraint(gradient, spec),),
)


def with_whole_weights(module: M) -> M:
  """The module with `whole_weights`."""
  if not divides_weights():
    return module
  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, whole_weights(state))


def recomputed(body: Callable, *, in_scan: bool = True) -> Callable:
  """`body`, the run of a block, computed again in a backward pass where weights are divided.

  Otherwise its gathered weights would be kept; of its results attention kernels' alone are.
  """
  if not divides_weights():
    return body
  return jax.checkpoint(body, prevent_cse=not in_scan, policy=KEEP_ATTENTION)


def in_row_blocks(
  f: Callable[[Float[Array, "R D"]], Float[Array, "R E"]], x: Float[Array, "*B D"]
) -> Float[Array, "*B E"]:
  """f(x) for an `f` that treats every row by itself.

  On CPUs so many rows at a time that what lies between wide layers stays in the cache.
  """
  if not on_one_cpu() or x.size < 2 * ROW_BLOCK * x.shape[-1]:
    return f(x)
  rows = x.reshape(-1, x.shape[-1])
  whole = len(rows) // ROW_BLOCK * ROW_BLOCK
  out = jax.lax.map(f, rows[:whole].reshape(-1, ROW_BLOCK, rows.shape[-1]))
  out = out.reshape(whole, -1)
  if whole < len(rows):
    out = jnp.concatenate([out, f(rows[whole:])])
  return out.reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
  """(.., in) -> (.., out): x W^T + b, in the dtype of x; with `head_dim` (.., out / H, H)."""

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    axes: Axes = (None, None),
    head_dim: int | None = None,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
    self.weight = param(rngs, (out_features, in_features), init, axes)
    zeros = nnx.initializers.zeros
    self.bias = param(rngs, (out_features,), zeros, axes[:1]) if bias else None
    self.head_dim = head_dim

  def _by_heads(self, weight: Float[Array, "out *in"]) -> Array:
    if self.head_dim is None:
      return weight
    return weight.reshape(-1, self.head_dim, *weight.shape[1:])

  def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B_out"]:
    shape = x.shape
    if x.ndim > 3:  # maps: as a matrix product, not as a convolution
      x = x.reshape(shape[0], -1, shape[-1])
    y = linear(x, self._by_heads(self.weight[...].astype(x.dtype)))
    if self.bias is not None:
      y = y + self._by_heads(self.bias[...].astype(x.dtype))
    return y.reshape(*shape[:-1], *y.shape[x.ndim - 1 :])


class Embedding(nnx.Module):
  """(..) int -> (.., D): rows of a learned table."""

  def __init__(self, num_embeddings: int, features: int, *, axes: Axes, rngs: nnx.Rngs):
    self.weight = param(rngs, (num_embeddings, features), nnx.initializers.normal(0.02), axes)

  def __call__(self, ids: Int32[Array, "*B"]) -> Float[Array, "*B D"]:
    table = self.weight[...]
    if platform() == "cpu" and table.dtype == jnp.bfloat16:
      return _rows_16(table, ids)
    return jnp.take(table, ids, axis=0)


@jax.custom_jvp
def _rows_16(table: Float[Array, "N D"], ids: Int32[Array, "*B"]) -> Float[Array, "*B D"]:
  """Rows of a bfloat16 table, taken as integers: XLA's CPU compiler would widen the whole table.

  Without the barrier it would copy the integers before a loop over tokens.
  """
  table, ids = jax.lax.optimization_barrier((table, ids))
  bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
  return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0), table.dtype)


@_rows_16.defjvp
def _rows_16_slope(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple:
  table, ids = primals
  return _rows_16(table, ids), jnp.take(tangents[0], ids, axis=0)


class RMSNorm(nnx.Module):
  """x / rms(x) * weight over the last axis, computed in float32 (HF Qwen3VLTextRMSNorm)."""

  def __init__(self, features: int, eps: float, rngs: nnx.Rngs):
    self.weight = param(rngs, (features,), nnx.initializers.ones, (None,))
    self.eps = eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
    return (h * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """LayerNorm over the last axis with weight and bias, computed in float32.

  On channels-last maps this is also SAM 2's LayerNorm2d. PyTorch's default eps is 1e-5, Hiera,
  LayerNorm2d and the Qwen3-VL tower use 1e-6, so the caller states it.
  """

  def __init__(self, features: int, eps: float, rngs: nnx.Rngs):
    self.weight = param(rngs, (features,), nnx.initializers.ones, (None,))
    self.bias = param(rngs, (features,), nnx.initializers.zeros, (None,))
    self.eps = eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
    h = h * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
    return h.astype(x.dtype)


def gelu_exact(x: Array) -> Array:
  """x (1 + erf(x / sqrt 2)) / 2: torch's default, and what SAM 2 and the Qwen3-VL mergers use.

  In float32, since 1 + erf cancels below 0. XLA has an operation for erf, but compiles erfc, which
  `jax.nn.gelu` takes, to some hundred.
  """
  h = x.astype(jnp.float32)
  return (h * (0.5 + 0.5 * jax.lax.erf(h * 0.5**0.5))).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
  """GELU's tanh approximation: the Qwen3-VL vision blocks."""
  return jax.nn.gelu(x, approximate=True)
