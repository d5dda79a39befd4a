"""Scenes of the shapes world: which objects stand where, and how each is named.

A scene graph has no pixels (`shapes_draw` makes those). Held-out (kind, colour, pattern)
combinations never appear in the training split; every picture of the eval split has one.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

KINDS = (
  *("circle", "square", "triangle", "star", "cross"),
  *("moon", "key", "lock", "plug", "socket"),
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
PATTERNS = ("plain", "striped", "dotted")
SPLITS = ("train", "eval")
COLUMNS = "ABCDEF"
"""Of the map grid that is laid over every picture, left to right; its rows are 1 to 6 downwards."""
CANVASES = ((192, 192), (168, 216), (216, 168))
"""Picture sizes in pixels: (height, width)."""

_RADII_PX = {"small": (14.0, 17.5), "": (20.0, 24.0), "large": (27.0, 33.0)}
_NUM_OBJECTS = {4: 0.16, 5: 0.22, 6: 0.22, 7: 0.16, 8: 0.12, 9: 0.07, 10: 0.05}
_SPACING = 0.78
"""Least distance of two centres, as a share of the sum of their radii."""

FIELDS = ("size", "pattern", "colour")
"""The words before a noun, in the order in which they are spoken."""
_FIELD_SETS = (
  *((), ("colour",), ("pattern",), ("size",)),
  *(("pattern", "colour"), ("size", "colour"), ("size", "pattern"), FIELDS),
)


@dataclass(frozen=True)
class Shape:
  """One object. Positions and radius are in pixels, the angle in radians."""

  kind: str
  colour: str
  pattern: str
  radius: float
  x: float = 0.0
  y: float = 0.0
  angle: float = 0.0
  number: int = 0
  """N of the annotation's tag `<objN>`."""
  cell: str = ""
  """Where the centre lies on the map grid: column and row, such as "B2"."""

  @property
  def size(self) -> str:
    """ "small", "large" or, in between, the empty string."""
    return "small" if self.radius < 18.5 else "large" if self.radius > 25.5 else ""

  @property
  def tag(self) -> str:
    """The annotation's tag."""
    return f"<obj{self.number}>"

  @property
  def combination(self) -> tuple[str, str, str]:
    """Kind, colour and pattern."""
    return self.kind, self.colour, self.pattern

  def phrase(self, fields: Iterable[str] = FIELDS, noun: str = "") -> str:
    """The words of the given fields, then the noun (the kind unless given)."""
    words = {"size": self.size, "pattern": self.pattern, "colour": self.colour}
    return " ".join([words[f] for f in FIELDS if f in fields and words[f]] + [noun or self.kind])

  @property
  def located(self) -> str:
    """The full phrase with the place before it, such as "B2 small plain red star"."""
    return f"{self.cell} {self.phrase()}"


@dataclass(frozen=True)
class Scene:
  """A picture before it is drawn."""

  height: int
  width: int
  shapes: tuple[Shape, ...]
  """In drawing order: later ones lie over earlier ones."""
  seed: int
  """Of the background and of the shading."""

  def name(self, shape: Shape) -> str:
    """The minimal unique phrase of a shape, such as "small blue key"."""
    for fields in _FIELD_SETS:
      phrase = shape.phrase(fields)
      if ("size" not in fields or shape.size) and self.is_unique(shape, fields):
        return phrase
    raise ValueError(f"{shape} has no unique name")

  def is_unique(self, shape: Shape, fields: Iterable[str], any_kind: bool = False) -> bool:
    """Whether no other shape (of the kind) has the same values in `fields`."""
    values = [_value(shape, f) for f in fields]
    return not any(
      other != shape
      and (any_kind or other.kind == shape.kind)
      and values == [_value(other, f) for f in fields]
      for other in self.shapes
    )

  def of(self, **values: str) -> list[Shape]:
    """The shapes with the given attribute values, by column and then by row of the map grid."""
    return in_order(s for s in self.shapes if all(_value(s, f) == v for f, v in values.items()))


def in_order(shapes: Iterable[Shape]) -> list[Shape]:
  """Shapes by column and then by row of the map grid, left to right within a cell."""
  return sorted(shapes, key=lambda s: (s.cell, s.x))


def _value(shape: Shape, field: str) -> str:
  values = {"kind": shape.kind, "size": shape.size}
  return (values | {"colour": shape.colour, "pattern": shape.pattern})[field]


def is_held_out(combination: tuple[str, str, str]) -> bool:
  """Whether a (kind, colour, pattern) is kept from the training split (about 1 in 8)."""
  kind, colour, pattern = combination
  return (KINDS.index(kind) + 3 * COLOURS.index(colour) + 5 * PATTERNS.index(pattern)) % 8 == 0


def _clash(a: Shape, b: Shape) -> bool:
  """Whether two shapes cannot be told apart by words."""
  return a.combination == b.combination and {a.size, b.size} != {"small", "large"}


def _subset(
  rng: np.random.Generator, values: Sequence[str], count: int, first: Sequence[str] = ()
) -> list[str]:
  rest = [v for v in values if v not in first]
  return [*first, *rng.permutation(rest)[: max(0, count - len(first))].tolist()]


def _radius(rng: np.random.Generator) -> float:
  low, high = _RADII_PX[("small", "", "large")[rng.choice(3, p=(0.33, 0.33, 0.34))]]
  return float(rng.uniform(low, high))


def _attributes(rng: np.random.Generator, split: str, kinds: tuple[str, ...]) -> list[Shape] | None:
  """Objects without positions; kinds, colours and patterns repeat within a picture."""
  count = int(rng.choice(list(_NUM_OBJECTS), p=list(_NUM_OBJECTS.values())))
  pools = (
    _subset(rng, KINDS, int(rng.integers(2, 5)), kinds),
    _subset(rng, COLOURS, int(rng.integers(3, 6))),
    _subset(rng, PATTERNS, int(rng.integers(2, 4))),
  )
  shapes: list[Shape] = []
  if split == "eval":
    held_out = [c for c in itertools.product(KINDS, COLOURS, PATTERNS) if is_held_out(c)]
    near = [c for c in held_out if c[0] in pools[0]]
    shapes.append(Shape(*near[rng.integers(len(near))], radius=_radius(rng)))
  for _ in range(40):
    if len(shapes) == count:
      return shapes
    kind, colour, pattern = (pool[rng.integers(len(pool))] for pool in pools)
    shape = Shape(kind, colour, pattern, _radius(rng))
    if split == "train" and is_held_out(shape.combination):
      continue
    if not any(_clash(shape, other) for other in shapes):
      shapes.append(shape)
  return None


def _place(
  rng: np.random.Generator, shapes: list[Shape], height: int, width: int
) -> list[Shape] | None:
  """Finds a position for every object, the largest first; None where there is no room."""
  placed: list[Shape] = []
  for shape in sorted(shapes, key=lambda s: -s.radius):
    margin = shape.radius + 2
    for _ in range(40):
      across, down = rng.beta(0.8, 0.8, 2)  # leans to the edges, which a margin keeps free
      x = float(margin + across * (width - 2 * margin))
      y = float(margin + down * (height - 2 * margin))
      if all(np.hypot(x - s.x, y - s.y) > _SPACING * (shape.radius + s.radius) for s in placed):
        placed.append(replace(shape, x=x, y=y))
        break
    else:
      return None
  return placed


def _cell(shape: Shape, height: int, width: int) -> str:
  column, row = (int(len(COLUMNS) * c) for c in (shape.x / width, shape.y / height))
  return f"{COLUMNS[column]}{row + 1}"


def draft_scene(rng: np.random.Generator, split: str, kinds: tuple[str, ...] = ()) -> Scene:
  """Draws a scene that has the given kinds in its pool; visibility is not checked."""
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
  while True:
    height, width = CANVASES[rng.integers(len(CANVASES))]
    shapes = _attributes(rng, split, kinds)
    placed = _place(rng, shapes, height, width) if shapes else None
    if not placed:
      continue
    turned = []
    for number in rng.permutation(len(placed)):
      angle = float(np.deg2rad(rng.uniform(-20, 20))) if rng.random() < 0.6 else 0.0
      cell = _cell(placed[number], height, width)
      turned.append(replace(placed[number], angle=angle, cell=cell))
    numbers = rng.permutation(len(turned)) + 1
    final = tuple(replace(s, number=int(n)) for s, n in zip(turned, numbers, strict=True))
    return Scene(height, width, final, int(rng.integers(2**31)))
