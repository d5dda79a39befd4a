"""The programs of a recipe with shapes and shardings in place of arrays, ready to be lowered."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from vrt_jax.config import MeshConfig, TrainConfig
from vrt_jax.generate.decode import DecodeState, GenerationInputs, TokenIds, decode, prefill
from vrt_jax.generate.sampling import Sampling
from vrt_jax.models.qwen3_vl.cache import GroupCache
from vrt_jax.models.sa2va import abstract_sa2va
from vrt_jax.ops.sharding import on_mesh
from vrt_jax.placement import batch_sharding, param_shardings
from vrt_jax.rl.policy import GrpoBatch
from vrt_jax.rl.rollout import make_rollout
from vrt_jax.runtime import MESH_AXES, mesh_sizes
from vrt_jax.train.grpo_step import make_grpo_step
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.sft_step import make_sft_step
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.update import Step
from vrt_jax.types import Batch, Targets, TextInputs, VisionInputs

T = TypeVar("T")
IDS = TokenIds(seg=-1, end=-1, pad=0, forbidden=())
"""No token is [SEG] or ends a sample, which changes nothing of what a program costs at most."""


@dataclass(frozen=True)
class Lowered:
  """A program before compilation, its arguments, and those by part."""

  lowered: jax.stages.Lowered
  args: tuple[object, ...]
  parts: dict[str, object]


def _array(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding) -> Any:
  """The shape of an array, which stands for it in batches and states."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _lowered(function: Any, args: tuple[object, ...], parts: dict[str, object]) -> Lowered:
  return Lowered(function.lower(*args), args, parts)


def topology_mesh(topology: str, config: MeshConfig) -> Mesh:
  """A mesh over the chips of a topology that need not be there.

  Raises:
    ValueError: the name is unknown, or the mesh does not fit its chips.
  """
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
    raise ValueError(f"--topology {topology}: {str(error).splitlines()[0]}") from error
  sizes = mesh_sizes(config, len(devices))
  placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _placed(state: nnx.State, mesh: Mesh, dtype: DTypeLike) -> nnx.State:
  return jax.tree.map(
    lambda x, sharding: _array(x.shape, dtype, sharding),
    state,
    param_shardings(state, mesh),
  )


def _whole(x: Any, mesh: Mesh) -> Any:
  return _array(x.shape, x.dtype, NamedSharding(mesh, PartitionSpec()))


def training_state(config: TrainConfig, mesh: Mesh) -> tuple[TrainState, Frozen]:
  """As `vrt_jax.train.state.create_state` makes it."""
  model = abstract_sa2va(config.model)
  graphdef, *states = nnx.split(model, trainable_filter(config.optim.trainable), ...)
  trainable = _placed(states[0], mesh, jnp.float32)
  frozen = _placed(states[1], mesh, jnp.dtype(config.model.compute_dtype))

  def place(part: object) -> object:
    if isinstance(part, nnx.State):
      return jax.tree.map(
        lambda x, like: _array(x.shape, x.dtype, like.sharding),
        part,
        trainable,
      )
    return _whole(part, mesh)

  optimizer = make_optimizer(config.optim)
  opt_state = jax.tree.map(
    place,
    jax.eval_shape(optimizer.init, trainable),
    is_leaf=lambda s: isinstance(s, nnx.State),
  )
  counter = _whole(jax.ShapeDtypeStruct((), jnp.int32), mesh)
  return TrainState(counter, trainable, opt_state, counter), Frozen(graphdef, frozen)


def inputs(
  config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]
) -> tuple[TextInputs, VisionInputs, Any]:
  """(text, vision, grounding image) of `batch` samples in a bucket."""

  array = partial(_array, sharding=batch_sharding(mesh))
  tokens, patches = bucket
  size = config.image.grounding_size_px
  text = TextInputs(
    input_ids=array((batch, tokens), jnp.int32),
    token_mask=array((batch, tokens), bool),
    position_ids=_array((3, batch, tokens), jnp.int32, batch_sharding(mesh, 1)),
    visual_index=array((batch, tokens), jnp.int32),
  )
  vision = VisionInputs(
    pixel_values=array((batch, patches, config.model.vision.patch_dim), jnp.uint8),
    patch_segments=array((batch, patches), jnp.int32),
    patch_positions=array((batch, patches, 2), jnp.int32),
    pos_embed_index=array((batch, patches, 4), jnp.int32),
    pos_embed_weight=array((batch, patches, 4), jnp.float32),
  )
  return text, vision, array((batch, size, size, 3), jnp.uint8)


def lower_sft(config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]) -> Lowered:
  """The SFT step."""
  state, frozen = training_state(config, mesh)
  text, vision, grounding = inputs(config, mesh, batch, bucket)
  masks, side = config.data.num_objects, config.image.grounding_size_px // 4

  array = partial(_array, sharding=batch_sharding(mesh))
  targets = Targets(
    labels=array((batch, bucket[0]), jnp.int32),
    seg_positions=array((batch, masks), jnp.int32),
    seg_valid=array((batch, masks), bool),
    masks=array((batch, masks, side, side), jnp.uint8),
  )
  data = Batch(vision=vision, text=text, grounding_image=grounding, targets=targets)
  step = make_sft_step(make_optimizer(config.optim), config.optim, config.sft, state)
  return _lowered_step(step, state, frozen, data, mesh)


def _lowered_step(
  step: Step, state: TrainState, frozen: Frozen, data: Batch | GrpoBatch, mesh: Mesh
) -> Lowered:
  parts = {
    "frozen parameters": frozen.params,
    "trained parameters": state.trainable,
    "optimizer": state.opt_state,
    "batch": data,
  }
  return _lowered(step, (state, frozen, data, _key(mesh)), parts)


def _key(mesh: Mesh) -> Any:
  return _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def _prompts(
  config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]
) -> GenerationInputs:
  text, vision, grounding = inputs(config, mesh, batch, bucket)
  deltas = _array((batch,), jnp.int32, batch_sharding(mesh))
  return GenerationInputs(text, vision, deltas, grounding)


def _merged_parameters(config: TrainConfig, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
  """Of the model without adapters, in its compute dtype."""
  merged = dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, rank=0))
  graphdef, params = nnx.split(abstract_sa2va(merged))
  return graphdef, _placed(params, mesh, jnp.dtype(merged.compute_dtype))


def _prefill(
  config: TrainConfig, mesh: Mesh, graphdef: nnx.GraphDef
) -> Callable[[nnx.State, GenerationInputs], tuple[DecodeState, jax.Array]]:
  """The prompts' pass into a new cache with room for `config.eval.max_new_tokens`."""

  def run(params: nnx.State, prompts: GenerationInputs) -> tuple[DecodeState, jax.Array]:
    with on_mesh(mesh.abstract_mesh):
      model = nnx.merge(graphdef, params)
      return prefill(model, prompts, config.eval.max_new_tokens, config.eval.max_masks, IDS)

  return run


def lower_prefill(config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]) -> Lowered:
  """The prompts' pass in an evaluation."""
  graphdef, params = _merged_parameters(config, mesh)
  prompts = _prompts(config, mesh, batch, bucket)
  parts = {"parameters": params, "batch": prompts}
  return _lowered(jax.jit(_prefill(config, mesh, graphdef)), (params, prompts), parts)


def lower_decode(config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]) -> Lowered:
  """All tokens of `batch` samples after `lower_prefill`, greedily."""
  graphdef, params = _merged_parameters(config, mesh)
  prompts = _prompts(config, mesh, batch, bucket)

  def run(params: nnx.State, state: DecodeState, logits: jax.Array) -> DecodeState:
    with on_mesh(mesh.abstract_mesh):
      return decode(nnx.merge(graphdef, params), state, logits, Sampling(), IDS)

  state, logits = jax.eval_shape(_prefill(config, mesh, graphdef), params, prompts)
  state, logits = _placed_samples(state, mesh), _rows(logits, mesh)
  parts = {
    "language model": params["qwen"]["language_model"],
    "cache": state.cache,
    "state": (state.replace(cache=None), logits),
  }
  return _lowered(jax.jit(run, donate_argnums=1), (params, state, logits), parts)


def _rows(tree: T, mesh: Mesh) -> T:
  """Samples over the mesh; numbers are whole on every chip."""
  rows = batch_sharding(mesh)
  return jax.tree.map(lambda x: _array(x.shape, x.dtype, rows) if x.ndim else _whole(x, mesh), tree)


def _placed_samples(state: DecodeState, mesh: Mesh) -> DecodeState:
  """Key heads over the tensor axis where it divides them, as prefill leaves them."""
  whole = state.cache
  assert isinstance(whole, GroupCache)
  heads = "tensor" if whole.k.shape[-2] % mesh.shape["tensor"] == 0 else None

  def placed(x: Any) -> Any:
    """[L, B, .., K, H]."""
    spec = PartitionSpec(None, ("data", "fsdp"), *[None] * (x.ndim - 4), heads)
    return _array(x.shape, x.dtype, NamedSharding(mesh, spec))

  prompt, (k, v) = jax.tree.map(placed, whole.prompt), map(placed, (whole.k, whole.v))
  cache = whole.replace(prompt=prompt, k=k, v=v, prompt_mask=_rows(whole.prompt_mask, mesh))
  return _rows(state.replace(cache=None), mesh).replace(cache=cache)


def lower_rollout(config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]) -> Lowered:
  """The group rollout of `batch` prompts, adapters beside the weights."""
  state, frozen = training_state(config, mesh)
  prompts = _prompts(config, mesh, batch, bucket)
  rollout = make_rollout(config.grpo, IDS, mesh.abstract_mesh)
  parts = {
    "frozen parameters": frozen.params,
    "trained parameters": state.trainable,
    "batch": prompts,
  }
  return _lowered(rollout, (state.trainable, frozen, prompts, _key(mesh)), parts)


def grpo_batch(
  config: TrainConfig, mesh: Mesh, prompts: GenerationInputs, state: TrainState, frozen: Frozen
) -> GrpoBatch:
  """An update's input: the rollout's output, its prompts, and what rewards make of it."""
  batch = prompts.rope_deltas.shape[0]
  rollout = make_rollout(config.grpo, IDS, mesh.abstract_mesh)
  out = jax.eval_shape(rollout, state.trainable, frozen, prompts, jax.random.key(0))
  grpo, side = config.grpo, config.model.sam2.mask_size

  def rows(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    return _array((batch, *shape), dtype, batch_sharding(mesh))

  return GrpoBatch(
    prompts=prompts.text,
    rope_deltas=prompts.rope_deltas,
    visual=_rows(out.visual, mesh),
    image=_rows(out.image, mesh),
    completions=_rows(out.completions, mesh),
    advantages=rows((grpo.group_size,), jnp.float32),
    credit=rows((grpo.group_size, grpo.max_new_tokens), jnp.float32),
    best=rows((), jnp.int32),
    best_valid=rows((), bool),
    best_is_answer=rows((grpo.max_masks,), bool),
    answer_mask=rows((side, side), jnp.uint8),
  )


def lower_grpo(config: TrainConfig, mesh: Mesh, batch: int, bucket: tuple[int, int]) -> Lowered:
  """The GRPO update on `batch` prompts and their groups."""
  state, frozen = training_state(config, mesh)
  prompts = _prompts(config, mesh, batch, bucket)
  data = grpo_batch(config, mesh, prompts, state, frozen)
  optimizer = make_optimizer(config.optim)
  step = make_grpo_step(optimizer, config.optim, config.grpo, config.sft, state)
  return _lowered_step(step, state, frozen, data, mesh)


PROGRAMS = {
  "sft": lower_sft,
  "prefill": lower_prefill,
  "decode": lower_decode,
  "rollout": lower_rollout,
  "grpo": lower_grpo,
}
"""Program -> its lowering."""
