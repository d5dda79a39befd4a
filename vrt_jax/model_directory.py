"""Model directories: what every command takes as --checkpoint.

    config.json     ModelConfig
    processor.json  ImageConfig
    tokenizer/      tokenizer.json, tokenizer_config.json
    params/         Orbax checkpoint of all parameters
    carried/        optional: files and tensors of the checkpoint it was converted from

A directory is written under a temporary name and renamed when it is complete, so a half-written one
never loads.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from vrt_jax.config import ComputeDtype, ImageConfig, ModelConfig, Sam2Config, from_dict
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.models.layers import ShapeRngs
from vrt_jax.models.lora import merge_lora
from vrt_jax.models.sa2va import Sa2VA, abstract_sa2va
from vrt_jax.models.sam2.model import Sam2
from vrt_jax.placement import param_shardings, place_params
from vrt_jax.runtime import barrier, is_leader

T = TypeVar("T")
M = TypeVar("M", bound=nnx.Module)

CARRIED = "carried"
PARTS = ("config.json", "processor.json", "tokenizer/tokenizer.json", "params")
SAM2_CONFIG = "sam2.json"
"""In the place of config.json where a directory holds SAM 2 alone: its Sam2Config."""
SHIPPED = {"shapes": "shapes_sft", "shapes_base": "shapes_base"}
"""Names that stand for a model directory inside the package: trained on traces, and its base."""


@dataclass(frozen=True)
class Loaded:
  """A model with all it takes to use it."""

  model: Sa2VA
  tokenizer: ChatTokenizer
  image: ImageConfig
  carried: Path | None = None
  """Folder of what a conversion kept for the way back; copied into directories made from this."""


def resolve(path: str) -> Path:
  """The folder that a --checkpoint value names.

  Raises:
    ValueError: it is no model directory.
  """
  if path in SHIPPED:
    folder = Path(str(resources.files("vrt_jax") / "assets" / SHIPPED[path]))
  else:
    folder = Path(path)
  missing = [part for part in PARTS if not (folder / part).exists()]
  if missing and (folder / SAM2_CONFIG).is_file():
    raise ValueError(f"{folder} is SAM 2 alone, without a language model")
  if missing:
    raise ValueError(f"{folder} is not a model directory: it has no {missing[0]}")
  return folder


def load_abstract(path: str, dtype: ComputeDtype | None = None) -> Loaded:
  """A model directory with shapes instead of parameters; arguments and errors as of `load`."""
  folder = resolve(path)
  carried = folder / CARRIED
  config = read_json(folder / "config.json", ModelConfig)
  if dtype is not None:
    config = dataclasses.replace(config, compute_dtype=dtype)
  return Loaded(
    model=abstract_sa2va(config),
    tokenizer=ChatTokenizer.from_dir(folder / "tokenizer"),
    image=read_json(folder / "processor.json", ImageConfig),
    carried=carried if carried.is_dir() else None,
  )


def load(path: str, dtype: ComputeDtype | None = None, mesh: Mesh | None = None) -> Loaded:
  """Reads a model directory; parameters come in the compute dtype, however they are stored.

  `dtype` is another compute dtype than the one in config.json. Parameters are divided over the
  devices of `mesh` as training divides them, and at no time does a device hold more than its part.
  Without it they are on this process's first device.

  Raises:
    ValueError: not a model directory, or one whose parameters have other shapes.
  """
  loaded = load_abstract(path, dtype)
  compute_dtype = loaded.model.config.compute_dtype
  divided = mesh if mesh is not None and mesh.size > 1 else None
  model = _restore(resolve(path) / "params", loaded.model, compute_dtype, divided)
  return dataclasses.replace(loaded, model=model)


def load_sam2(path: str) -> Sam2:
  """Reads SAM 2 alone, from a directory of its own or from a whole model's; float32.

  Raises:
    ValueError: neither, or one whose parameters have other shapes.
  """
  file = Path(path) / SAM2_CONFIG
  if file.is_file():
    config = read_json(file, Sam2Config)
  else:
    config = read_json(resolve(path) / "config.json", ModelConfig).sam2
  folder = file.parent if file.is_file() else resolve(path)
  model = nnx.eval_shape(lambda: Sam2(config, ShapeRngs()))
  return _restore(folder / "params", model, "float32", part="sam2")


def _restore(params: Path, model: M, dtype: str, mesh: Mesh | None = None, part: str = "") -> M:
  """An abstract model with values; `part` is its name in the checkpoint, "" for the whole of it.

  Onto a mesh, each of several processes reads what its devices hold. One alone reads everything
  once, into the host's memory, and not once for each device.
  """
  graphdef, state = nnx.split(model)
  by_host = mesh is not None and jax.process_count() == 1
  shapes = nnx.to_pure_dict(state)
  if mesh is None or by_host:
    here = SingleDeviceSharding(jax.local_devices()[0])  # not the devices that wrote it
    placement = jax.tree.map(lambda _: here, shapes)
  else:
    placement = nnx.to_pure_dict(param_shardings(state, mesh))
  wanted = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=sharding),
    shapes,
    placement,
  )
  target = {part: wanted} if part else wanted
  if by_host:
    how = jax.tree.map(lambda x: ocp.RestoreArgs(np.ndarray, x.dtype), target)
  else:
    how = ocp.checkpoint_utils.construct_restore_args(target)
  args = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=bool(part))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    try:
      found = checkpointer.restore(params.resolve(), args=args)
      if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, target):
        raise ValueError("arrays have other shapes")
    except (ValueError, FileNotFoundError, KeyError) as error:
      raise ValueError(f"{params} does not fit the sizes that are given beside it") from error
  nnx.replace_by_pure_dict(state, found[part] if part else found)
  if mesh is not None and by_host:
    state = place_params(state, mesh)
  return nnx.merge(graphdef, state)


def save(
  path: Path,
  model: Sa2VA,
  tokenizer: ChatTokenizer,
  image: ImageConfig,
  dtype: str = "float32",
  carried: Path | None = None,
) -> None:
  """Writes a model directory, LoRA merged, replacing `path` at the end.

  Of several processes all call this: each writes its part of the parameters, one writes the rest.
  """
  path = path.resolve()
  temporary = path.with_name(path.name + ".partial")
  merged = merge_lora(model)
  if is_leader():
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / "processor.json", image)
    tokenizer.save(temporary / "tokenizer")
    if carried:
      shutil.copytree(carried, temporary / CARRIED)
  barrier(f"{temporary} is there")
  params = nnx.to_pure_dict(nnx.state(merged, nnx.Param))
  params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(temporary / "params", params)
  if is_leader():
    (temporary / "params" / "commit_success.txt").unlink(missing_ok=True)  # has the temporary path
    write_json(temporary / "config.json", merged.config)  # the last file: without it nothing loads
    if path.exists():
      shutil.rmtree(path)
    os.replace(temporary, path)
  barrier(f"{path} is there")


def read_json(path: Path, cls: type[T]) -> T:
  """Reads a configuration dataclass; ValueError names the file that is not JSON or does not fit."""
  try:
    values = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  return from_dict(cls, values, str(path))


def write_json(path: Path, config: Any) -> None:
  """Writes a configuration dataclass."""
  path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
