"""The training state, shared by SFT and RL: trainable and frozen parameters, optimiser, step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.models.stacks import with_layers_apart
from vrt_jax.placement import place_params, replicate
from vrt_jax.train.optim import Filter


class TrainState(flax.struct.PyTreeNode):
  """Everything a step changes; a checkpoint holds this and what `Checkpoints` adds."""

  step: jax.Array
  """Finished steps, skipped ones included."""
  trainable: nnx.State
  opt_state: optax.OptState
  skipped: jax.Array
  """Steps that changed no parameter, since their loss or gradient was not finite."""


class Frozen(flax.struct.PyTreeNode):
  """What no step changes: the module structure and the frozen parameters."""

  graphdef: nnx.GraphDef = flax.struct.field(pytree_node=False)
  params: nnx.State

  def merge(self, trainable: nnx.State) -> Sa2VA:
    """The model with the given trainable parameters."""
    return nnx.merge(self.graphdef, trainable, self.params)

  def on(self, mesh: Mesh) -> "Frozen":
    """The same on another mesh of the same devices."""
    return self.replace(params=place_params(self.params, mesh))

  def apart(self) -> "Frozen":
    """The same for rollouts, see `with_layers_apart`."""
    return self.replace(params=with_layers_apart(self.params))


def _is_on(mesh: Mesh, x: jax.Array) -> bool:
  return isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh


def create_state(
  model: Sa2VA, optimizer: optax.GradientTransformation, trainable: Filter, mesh: Mesh
) -> tuple[TrainState, Frozen]:
  """Splits a model by `trainable`, places both parts on the mesh and starts the optimiser.

  Frozen parameters are stored in the compute dtype, trained ones in float32.
  """
  graphdef, *parts = nnx.split(model, trainable, ...)
  train_params, frozen = parts
  dtype = jnp.dtype(model.config.compute_dtype)
  frozen = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, frozen)
  train_params = jax.tree.map(lambda x: x.astype(jnp.float32), train_params)
  train_params = place_params(train_params, mesh)
  frozen = place_params(frozen, mesh)
  opt_state = jax.tree.map(  # moments are placed like their parameters, the rest everywhere
    lambda x: x if _is_on(mesh, x) else replicate(x, mesh),
    optimizer.init(train_params),
  )
  step, skipped = (replicate(jnp.zeros((), jnp.int32), mesh) for _ in range(2))
  return TrainState(step, train_params, opt_state, skipped), Frozen(graphdef, frozen)


def to_pure(state: TrainState) -> dict:
  """A state as nested dicts of arrays, which Orbax stores by name."""
  return {
    "step": state.step,
    "skipped": state.skipped,
    "trainable": nnx.to_pure_dict(state.trainable),
    "opt_state": jax.tree.map(
      lambda s: nnx.to_pure_dict(s) if isinstance(s, nnx.State) else s,
      state.opt_state,
      is_leaf=lambda s: isinstance(s, nnx.State),
    ),
  }


def from_pure(like: TrainState, pure: dict) -> TrainState:
  """The inverse of `to_pure`, in the structure of `like`."""

  def fill(target: Any, values: Any) -> Any:
    if not isinstance(target, nnx.State):
      return values
    filled = jax.tree.map(lambda x: x, target)
    nnx.replace_by_pure_dict(filled, values)
    return filled

  return TrainState(
    step=pure["step"],
    skipped=pure["skipped"],
    trainable=fill(like.trainable, pure["trainable"]),
    opt_state=jax.tree.map(
      fill, like.opt_state, pure["opt_state"], is_leaf=lambda s: isinstance(s, nnx.State)
    ),
  )


def parameter_counts(state: TrainState, frozen: Frozen) -> dict[str, tuple[int, int]]:
  """Module -> (trainable, frozen) number of values, for the table printed at the start."""
  counts: dict[str, list[int]] = {}
  for column, tree in enumerate((state.trainable, frozen.params)):
    for path, leaf in nnx.to_flat_state(tree):
      name = ".".join(str(p) for p in path[:2])
      counts.setdefault(name, [0, 0])[column] += leaf.get_value().size
  return {name: (c[0], c[1]) for name, c in sorted(counts.items())}


def parameter_table(state: TrainState, frozen: Frozen) -> str:
  """Trainable and frozen parameters by module, with totals and the trainable share."""

  def row(name: str, trained: int, fixed: int) -> str:
    share = 100 * trained / max(1, trained + fixed)
    return f"{name:<36}{trained:>16,}{fixed:>16,}{share:>10.2f}%"

  counts = parameter_counts(state, frozen)
  totals = [sum(column) for column in zip(*counts.values(), strict=True)]
  head = f"{'module':<36}{'trainable':>16}{'frozen':>16}{'share':>11}"
  return "\n".join([head, *(row(name, *c) for name, c in counts.items()), row("total", *totals)])
