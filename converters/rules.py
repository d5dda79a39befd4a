"""Rules that name a checkpoint's tensors after ours, read in both directions.

A rule pairs two name templates: "visual.blocks.{layer}.{rest}" and "qwen.visual.blocks.{rest}".
Importing fills the right side from the left, and exporting the left from the right, so one table
cannot disagree with itself. Fields of a template:

    {layer}   a number that counts along the first axis of our stacked parameter
    {row}     a number that counts along the first axis of the checkpoint's tensor
    {i}       any other number
    {rest}, {name}, ..   the same text on both sides
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Shape = tuple[int, ...]
OpName = Literal["same", "conv1x1", "flat"]

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBERS = ("layer", "row", "i")


def _conv1x1(shape: Shape) -> Shape:
  if len(shape) != 4 or shape[2:] != (1, 1):
    raise ValueError(f"{shape} is no 1x1 convolution")
  return shape[:2]


def _flat(shape: Shape) -> Shape:
  return (shape[0], int(np.prod(shape[1:])))


OPS: dict[OpName, Callable[[Shape], Shape]] = {
  "same": lambda shape: shape,
  "conv1x1": _conv1x1,
  "flat": _flat,
}
"""Checkpoint's shape -> ours: as it is; a 1x1 convolution as a matrix; a patch convolution as a
matrix. All keep the order of the values, so a reshape undoes them."""


@dataclass(frozen=True)
class Rule:
  """A template of the checkpoint's names, that of ours, and the change of shape between them."""

  source: str
  target: str
  op: OpName = "same"


@dataclass(frozen=True)
class Ignored:
  """Names of a checkpoint that our models have no use for, and why; `pattern` is a regex."""

  pattern: str
  reason: str


@dataclass(frozen=True)
class Tied:
  """A tensor that a checkpoint holds twice: `copy` must equal `original` and is then left out."""

  copy: str
  original: str


@dataclass(frozen=True)
class Part:
  """A tensor of a checkpoint, or one row of it, as a parameter of ours, or as one layer of it."""

  key: str
  layer: int | None = None
  row: int | None = None


def _regex(template: str) -> re.Pattern:
  parts, end = [], 0
  for field in _FIELD.finditer(template):
    content = r"\d+" if field[1] in _NUMBERS else ".+"
    parts += [re.escape(template[end : field.start()]), f"(?P<{field[1]}>{content})"]
    end = field.end()
  return re.compile("".join(parts) + re.escape(template[end:]))


class RuleTable:
  """Rules, ignored names and tied tensors of one checkpoint layout."""

  def __init__(
    self,
    rules: Sequence[Rule],
    ignored: Sequence[Ignored] = (),
    tied: Sequence[Tied] = (),
  ):
    self._rules = [(rule, _regex(rule.source), _regex(rule.target)) for rule in rules]
    self._ignored = [(re.compile(entry.pattern), entry.reason) for entry in ignored]
    self.tied = tuple(tied)

  def targets(self, key: str, shape: Shape) -> tuple[Rule, list[tuple[str, Part]]]:
    """Our parameters that the tensor `key` fills, and the rule that says so.

    Raises:
      ValueError: no rule or several rules match.
    """
    found = [(rule, m) for rule, source, _ in self._rules if (m := source.fullmatch(key))]
    if len(found) != 1:
      raise ValueError(f"{key}: {len(found)} rules match" if found else f"{key}: unknown key")
    rule, match = found[0]
    fields = match.groupdict()
    layer = fields.pop("layer", None)
    if "{row}" not in rule.target:
      part = Part(key, None if layer is None else int(layer))
      return rule, [(rule.target.format(**fields), part)]
    rows = [(rule.target.format(row=row, **fields), row) for row in range(shape[0])]
    return rule, [(target, Part(key, row=row)) for target, row in rows]

  def parts(self, target: str, leading: int) -> tuple[Rule, list[Part]]:
    """The tensors that our parameter `target` is made of: one, or one for each of `leading` layers.

    Raises:
      ValueError: no rule or several rules match.
    """
    found = [(rule, m) for rule, _, ours in self._rules if (m := ours.fullmatch(target))]
    if len(found) != 1:
      raise ValueError(f"parameter {target}: {len(found)} rules match")
    rule, match = found[0]
    fields = match.groupdict()
    row = fields.pop("row", None)
    if "{layer}" in rule.source:
      layers = range(leading)
      return rule, [Part(rule.source.format(layer=layer, **fields), layer) for layer in layers]
    return rule, [Part(rule.source.format(**fields), row=None if row is None else int(row))]

  def ignored(self, key: str) -> str | None:
    """The reason why `key` is not converted; None where it has to be."""
    return next((reason for regex, reason in self._ignored if regex.fullmatch(key)), None)


def assign(
  table: RuleTable, sources: dict[str, Shape], targets: dict[str, Shape]
) -> tuple[dict[str, list[Part]], list[str]]:
  """Our parameters -> the tensors they are made of, in the order of layers; and all problems.

  Args:
    sources: names and shapes of the checkpoint's tensors.
    targets: dotted names and shapes of our parameters, stacked ones [L, ..].

  A problem is a line that names an unknown, missing or twice filled name or a wrong shape.
  """
  problems: list[str] = []
  filled: dict[str, dict[int | None, Part]] = {name: {} for name in targets}
  copies = {tie.copy for tie in table.tied}
  for key, shape in sources.items():
    if table.ignored(key) or key in copies:
      continue
    try:
      rule, found = table.targets(key, shape)
      shape = OPS[rule.op](shape)
    except ValueError as error:
      problems.append(str(error) if key in str(error) else f"{key}: {error}")
      continue
    for target, part in found:
      ours = (1, *shape[1:]) if part.row is not None else shape
      problem = _misfit(target, part, ours, filled, targets)
      if problem:
        problems.append(problem)
      else:
        filled[target][part.layer] = part
  for target, shape in targets.items():
    parts = table.parts(target, shape[0] if shape else 1)[1]
    problems += [f"{part.key}: missing" for part in parts if part.key not in sources]
  of_targets = {
    target: [part for _, part in sorted(by_layer.items(), key=lambda item: item[0] or 0)]
    for target, by_layer in filled.items()
  }
  return of_targets, problems


def _misfit(
  target: str,
  part: Part,
  shape: Shape,
  filled: dict[str, dict[int | None, Part]],
  targets: dict[str, Shape],
) -> str | None:
  """What is wrong with filling `target` by `part` of (our) `shape`; None where nothing is."""
  if target not in targets:
    return f"{part.key}: the model has no {target}"
  want = targets[target]
  if part.layer is not None and part.layer >= want[0]:
    return f"{part.key}: the model has {want[0]} layers"
  want = want[part.layer is not None :]
  if shape != want:
    return f"{part.key}: shape {list(shape)}, the model's is {list(want)}"
  if part.layer in filled[target]:
    return f"{part.key}: {target} is also filled by {filled[target][part.layer].key}"
  return None


class Problems(ValueError):
  """Everything that is wrong with a checkpoint, in one message."""

  def __init__(self, problems: Sequence[str]):
    self.problems = list(problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    super().__init__(f"{count}: " + "; ".join(problems))


def raise_all(problems: Iterable[str]) -> None:
  """Raises `Problems` with all of `problems`, if there are any."""
  problems = list(problems)
  if problems:
    raise Problems(problems)


def all_of(*steps: Callable[[], object]) -> list:
  """The results of all steps.

  Raises:
    ValueError: what one step raised, or `Problems` with what several did.
  """
  results, errors = [], []
  for step in steps:
    try:
      results.append(step())
    except ValueError as error:
      errors.append(error)
  if len(errors) == 1:
    raise errors[0]
  raise_all(problem for error in errors for problem in problems_of(error))
  return results


def problems_of(error: ValueError) -> list[str]:
  """What `error` lists."""
  return error.problems if isinstance(error, Problems) else [str(error)]
