"""What a checkpoint becomes: sizes, parameters to stream, and what is left over."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from flax import nnx

from converters.rules import RuleTable, Shape, assign, raise_all
from converters.streams import Checksums, StreamedArray, from_parts, of_source, whole
from converters.tensor_files import TensorSource, read_tensor
from vrt_jax.config import ImageConfig, ModelConfig, Sam2Config
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.models.layers import ShapeRngs
from vrt_jax.models.sa2va import TextHiddenFcs, abstract_sa2va
from vrt_jax.models.sam2.model import Sam2

Axes = tuple[str | None, ...]


@dataclass
class Conversion:
  """A checkpoint on its way into a model directory; nothing but headers has been read."""

  sam2: Sam2Config
  params: dict[str, StreamedArray]
  """Every parameter by its dotted name."""
  axes: dict[str, Axes]
  """Logical axes of every parameter."""
  checksums: Checksums
  """Of the checkpoint's tensors, complete when all parameters have been written."""
  model: ModelConfig | None = None
  """None where there is SAM 2 alone."""
  image: ImageConfig | None = None
  tokenizer: ChatTokenizer | None = None
  ignored: dict[str, str] = field(default_factory=dict)
  """Tensors that were not converted, and why."""
  carried: dict[str, StreamedArray] = field(default_factory=dict)
  """Ignored tensors that an export takes back, by their names there."""
  ties: dict[str, str] = field(default_factory=dict)
  """Second copies that the checkpoint had, and of what; an export writes them again."""
  notes: list[str] = field(default_factory=list)
  """What else a user should know."""

  def absorb(self, other: "Conversion") -> None:
    """Takes over the parameters, remarks and carried tensors of a conversion of SAM 2 alone."""
    self.params |= other.params
    self.axes |= other.axes
    self.ignored |= other.ignored
    self.carried |= other.carried
    self.notes += other.notes


def expected(model: nnx.Module, prefix: str = "") -> tuple[dict[str, Shape], dict[str, Axes]]:
  """Shapes and logical axes of all parameters of an (abstract) model, by dotted names."""
  shapes, axes = {}, {}
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    name = prefix + ".".join(map(str, path))
    shapes[name] = tuple(leaf.shape)
    axes[name] = tuple(leaf.get_metadata().get("axes", (None,) * len(leaf.shape)))
  return shapes, axes


def expected_sa2va(config: ModelConfig) -> tuple[dict[str, Shape], dict[str, Axes]]:
  """Those of the whole model.

  Raises:
    ValueError: sizes that do not fit together.
  """
  return expected(abstract_sa2va(config))


def expected_sam2(config: Sam2Config) -> tuple[dict[str, Shape], dict[str, Axes]]:
  """Those of SAM 2, under the name that it has in the whole model."""
  return expected(nnx.eval_shape(lambda: Sam2(config, ShapeRngs())), "sam2.")


def part_of(names: Mapping[str, Shape], *prefixes: str) -> dict[str, Shape]:
  """The parameters whose names start with one of `prefixes`."""
  return {name: shape for name, shape in names.items() if name.startswith(prefixes)}


def convert_tensors(
  table: RuleTable,
  source: TensorSource,
  shapes: Mapping[str, Shape],
  checksums: Checksums,
  base: Mapping[str, StreamedArray] | None = None,
) -> tuple[dict[str, StreamedArray], dict[str, str]]:
  """Parameters of `shapes` from a checkpoint, and its ignored tensors with reasons.

  With `base`, a parameter of which the checkpoint has nothing comes from there.

  Raises:
    ValueError: one message with every problem of the checkpoint's files, every unknown, missing,
      mis-shaped or twice filled tensor, and every tied pair that differs.
  """
  if not source.shapes:
    raise_all(source.problems)
  parts, found = assign(table, source.shapes, dict(shapes))
  lost = {f"{key}: missing" for key in source.lost}
  problems = source.problems + [problem for problem in found if problem not in lost]
  if base is not None:
    absent = {name for name, found in parts.items() if not found}
    allowed = {f"{part.key}: missing" for n in absent for part in table.parts(n, shapes[n][0])[1]}
    problems = [p for p in problems if p not in allowed]
  ignored = {key: reason for key in source.shapes if (reason := table.ignored(key))}
  for tie in table.tied:
    if tie.copy in source.shapes:
      problems += _tie_problems(source, tie.copy, tie.original)
      ignored[tie.copy] = f"the same as {tie.original}"
  raise_all(problems)
  params = {}
  for name, own in parts.items():
    if own or base is None:
      params[name] = from_parts(source, own, shapes[name], checksums)
    else:
      params[name] = base[name]
  return params, ignored


def unknown_names(table: RuleTable, source: TensorSource) -> list[str]:
  """The problems of a checkpoint that show without the model's sizes: files and unknown names."""
  copies = {tie.copy for tie in table.tied}
  problems = list(source.problems)
  for key, shape in source.shapes.items():
    if key not in copies and not table.ignored(key):
      try:
        table.targets(key, shape)
      except ValueError as error:
        problems.append(str(error))
  return problems


def _tie_problems(source: TensorSource, copy: str, original: str) -> list[str]:
  if original not in source.shapes:
    return []  # its absence is a problem of its own
  if source.shapes[copy] != source.shapes[original]:
    return [f"{copy}: tied to {original}, but of another shape"]
  array, other = of_source(source, copy), of_source(source, original)
  same = all(np.array_equal(a, b) for a, b in zip(array.blocks(), other.blocks(), strict=True))
  return [] if same else [f"{copy}: tied to {original} in config.json, but the values differ"]


def carry(source: TensorSource, names: Mapping[str, str]) -> dict[str, StreamedArray]:
  """Tensors of a checkpoint (name -> name in an export) that are kept for the way back."""
  return {new: whole(read_tensor(source, old)) for old, new in names.items()}


def fresh(module: nnx.Module, prefix: str) -> dict[str, StreamedArray]:
  """The initial parameters of a module, by their names in the whole model."""
  flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
  return {
    f"{prefix}{'.'.join(map(str, path))}": whole(np.asarray(jax.device_get(leaf.get_value())))
    for path, leaf in flat
  }


def fresh_heads(model: ModelConfig, seed: int) -> dict[str, StreamedArray]:
  """`text_hidden_fcs` as before training."""
  fcs = TextHiddenFcs(model.text.hidden_size, model.sam2.d_model, nnx.Rngs(seed))
  return fresh(fcs, "text_hidden_fcs.")


def fresh_sam2(config: Sam2Config, seed: int) -> dict[str, StreamedArray]:
  """SAM 2 as before training."""
  return fresh(Sam2(config, nnx.Rngs(seed)), "sam2.")
