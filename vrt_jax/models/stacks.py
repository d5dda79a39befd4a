"""Equal layers in one module, whose parameters lead with the layer, and how programs run them."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array

from vrt_jax.ops.sharding import on_one_cpu

Carry = TypeVar("Carry")
T = TypeVar("T")

LARGE = 2**22
"""Bytes of a stacked parameter from which on it is better not copied."""


class Apart(struct.PyTreeNode):
  """A stacked parameter whose layers are arrays of their own."""

  layers: tuple[Array, ...]

  def __getitem__(self, layer: int) -> Array:
    return self.layers[layer]


def _is_apart(node: object) -> bool:
  return isinstance(node, Apart)


def _any_apart(state: nnx.State) -> bool:
  return any(map(_is_apart, jax.tree.leaves(state, is_leaf=_is_apart)))


def stack(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
  """`num_layers` modules in one, every parameter with a leading axis L, ready for `scan_layers`."""
  return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(num_layers))


def with_layers_apart(params: nnx.State) -> nnx.State:
  """Parameters whose layers a program on one CPU reads where they lie; elsewhere as they are.

  Out of a stack it would copy every layer at each call, and hold the copies as long as it decodes.
  Here layers of `LARGE` stacks are views of them; the arrays of `params` must not be donated
  afterwards. Small models keep the loop over their layers, which is traced and compiled faster.
  """
  if not on_one_cpu():
    return params

  def cut(variable: nnx.Variable) -> nnx.Variable:
    value, axes = variable.get_value(), variable.get_metadata().get("axes")
    if axes is None or value.ndim == len(axes) or value.nbytes < LARGE:
      return variable
    if len(value.sharding.device_set) > 1:
      return variable
    return variable.replace(Apart(tuple(jax.device_put(list(np.asarray(value))))))

  return jax.tree.map(cut, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def layer_of(state: nnx.State, layer: int) -> nnx.State:
  """The parameters of one layer of a stack."""
  return jax.tree.map(lambda x: x[layer], state, is_leaf=_is_apart)


def scan_layers(
  body: Callable[[Carry, tuple[nnx.State, T]], tuple[Carry, None]],
  carry: Carry,
  state: nnx.State,
  rows: T,
  *,
  unroll: int = 1,
) -> Carry:
  """The last carry of `jax.lax.scan` over a stack's layers and `rows`, a tree of arrays [L, ..].

  Where a parameter's layers are apart they come one by one.
  """
  if not _any_apart(state):
    return jax.lax.scan(body, carry, (state, rows), unroll=unroll)[0]
  for i in range(len(jax.tree.leaves(rows)[0])):
    carry, _ = body(carry, (layer_of(state, i), jax.tree.map(lambda x, i=i: x[i], rows)))
    carry = jax.lax.optimization_barrier(carry)  # rounded to its dtypes, as a scan's
  return carry


def map_layers(f: Callable[[nnx.State, Array], Array], state: nnx.State, xs: Array) -> Array:
  """[f(a layer's parameters, a row of xs)] over a stack's layers: `jax.vmap`, or one by one."""
  if not _any_apart(state):
    return jax.vmap(f)(state, xs)
  return jnp.stack([f(layer_of(state, i), x) for i, x in enumerate(xs)])
