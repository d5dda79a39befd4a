"""Reasoning questions of the shapes world with traces, in VRT-Bench's four families.

Each function lists every question of one sort that has exactly one answer in a scene graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vrt_jax.data.shapes_scene import Scene, Shape

PLURALS = {"cross": "crosses"}
MARGIN_PX = 14.0
"""Least offset of two centres for "left of" and the like to hold."""
SIZE_RATIO = 1.3
"""Least ratio of two radii for "largest" and the like to hold; of distances for "nearest"."""
DIRECTIONS = {
  "left of": ("to the left of", -1.0, 0.0),
  "right of": ("to the right of", 1.0, 0.0),
  "above": ("above", 0.0, -1.0),
  "below": ("below", 0.0, 1.0),
}
"""Relation -> longer wording, and the unit vector it points along (y down)."""


@dataclass(frozen=True)
class Trace:
  """A question with its reasoning and answer; mentions are wrapped in <ver> and <vea>."""

  question: str
  reasoning: str
  answer_caption: str
  evidence: tuple[Shape, ...]
  """In order of mention; the answer is one of them."""
  answer: Shape


def plural(noun: str) -> str:
  """The plural of a kind or of "object"."""
  return PLURALS.get(noun, noun + "s")


def sentence(text: str) -> str:
  """The text with a capital first letter."""
  return text[0].upper() + text[1:]


def join(parts: list[str]) -> str:
  """ "a", "a and b", "a, b and c"."""
  return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ver(shape: Shape) -> str:
  return f"the {shape.located} (<ver>{shape.tag}</ver>)"


def _vea(shape: Shape) -> str:
  return f"The {shape.located} (<vea>{shape.tag}</vea>)"


def _introduce(noun: str, shapes: list[Shape]) -> str:
  mentions = join([_ver(s) for s in shapes])
  return f"The {plural(noun)} are {mentions}." if len(shapes) > 1 else f"There is {mentions}."


def kinds_of(scene: Scene) -> list[str]:
  """The kinds that stand in a scene, sorted."""
  return sorted({s.kind for s in scene.shapes})


def offset(shape: Shape, anchor: Shape, relation: str) -> float:
  """Pixels by which `shape` lies in the relation's direction, seen from `anchor`."""
  _, along_x, along_y = DIRECTIONS[relation]
  return along_x * (shape.x - anchor.x) + along_y * (shape.y - anchor.y)


def related(candidates: list[Shape], anchor: Shape, relation: str) -> Shape | None:
  """The only candidate that clearly stands in the relation; None where that is in doubt."""
  offsets = [(offset(s, anchor, relation), s) for s in candidates if s != anchor]
  chosen = [s for value, s in offsets if value >= MARGIN_PX]
  doubtful = [s for value, s in offsets if 0 < value < MARGIN_PX]
  return chosen[0] if len(chosen) == 1 and not doubtful else None


def extreme(candidates: list[Shape], word: str) -> Shape | None:
  """The clearly "largest" or "smallest" of two or more candidates."""
  ranked = sorted(candidates, key=lambda s: s.radius, reverse=word == "largest")
  if len(ranked) < 2:
    return None
  low, high = sorted((ranked[0].radius, ranked[1].radius))
  return ranked[0] if high >= SIZE_RATIO * low else None


def nearest(candidates: list[Shape], anchor: Shape) -> Shape | None:
  """The clearly nearest of two or more candidates, by the distance of centres."""
  ranked = sorted(
    (float(np.hypot(s.x - anchor.x, s.y - anchor.y)), s.number, s)
    for s in candidates
    if s != anchor
  )
  if len(ranked) < 2 or ranked[1][0] < SIZE_RATIO * ranked[0][0]:
    return None
  return ranked[0][2]


def _lookups(scene: Scene, rng: np.random.Generator) -> list[Trace]:
  """ "Find the striped star." """
  traces = []
  for shape in scene.shapes:
    name = scene.name(shape)
    words = name.split()[:-1]
    others = [s.phrase().split() for s in scene.shapes if s != shape]
    if not words or not all(any(word in other for other in others) for word in words):
      continue
    question = (f"Find the {name}.", f"Where is the {name}?", f"Which object is the {name}?")
    traces.append(
      Trace(
        question[rng.integers(3)],
        f"It is {_ver(shape)}.",
        f"{_vea(shape)} is here.",
        (shape,),
        shape,
      )
    )
  return traces


def _same(scene: Scene, rng: np.random.Generator) -> list[Trace]:
  """ "Which object has the same colour as the lock?" """
  traces = []
  for anchor in scene.shapes:
    for field, value in (("colour", anchor.colour), ("pattern", anchor.pattern)):
      alike = [s for s in scene.of(**{field: value}) if s != anchor]
      for noun in ["object", *kinds_of(scene)]:
        pool = [s for s in scene.shapes if s != anchor and noun in ("object", s.kind)]
        chosen = [s for s in alike if s in pool]
        if len(chosen) != 1 or len(pool) < 2:
          continue
        answer = chosen[0]
        others = [s for s in pool if s != answer]
        name = scene.name(anchor)
        question = (
          f"Which {noun} has the same {field} as the {name}?",
          f"Which {noun} shares the {field} of the {name}?",
        )
        start = f"{sentence(_ver(anchor))} is {value}."
        found = f"{_ver(answer)} is {value}"
        evidence: tuple[Shape, ...] = (anchor, answer)
        text = f"{sentence(found)} too."
        if rng.random() < 0.5:
          other = others[rng.integers(len(others))]
          not_so = other.colour if field == "colour" else other.pattern
          wrong = f"{_ver(other)} is {not_so}"
          if rng.random() < 0.5:
            evidence, text = (anchor, other, answer), f"{sentence(wrong)}, but {found} too."
          else:
            evidence, text = (anchor, answer, other), f"{sentence(found)} too, but {wrong}."
        traces.append(
          Trace(
            question[rng.integers(2)],
            f"{start} {text}",
            f"{_vea(answer)} has the same {field}.",
            evidence,
            answer,
          )
        )
  return traces


def _relations(scene: Scene, rng: np.random.Generator) -> list[Trace]:
  """ "Which star is left of the blue lock?" """
  traces = []
  for kind in kinds_of(scene):
    stars = scene.of(kind=kind)
    if len(stars) not in (2, 3):
      continue
    for anchor in scene.shapes:
      for relation, (long, _, _) in DIRECTIONS.items():
        answer = related(stars, anchor, relation) if anchor.kind != kind else None
        if answer is None:
          continue
        name = scene.name(anchor)
        question = (
          f"Which {kind} is {relation} the {name}?",
          f"Find the {kind} {long} the {name}.",
        )
        traces.append(
          Trace(
            question[rng.integers(2)],
            f"Start at {_ver(anchor)}. {_introduce(kind, stars)} "
            f"The {answer.cell} one is {relation} the {name}.",
            f"{_vea(answer)} is {relation} it.",
            (anchor, *stars),
            answer,
          )
        )
  return traces


def _nearest(scene: Scene, rng: np.random.Generator) -> list[Trace]:
  """ "Which object is nearest to the lock?" """
  traces = []
  for anchor in scene.shapes:
    answer = nearest(list(scene.shapes), anchor)
    if answer is None:
      continue
    name = scene.name(anchor)
    question = (f"Which object is nearest to the {name}?", f"What is closest to the {name}?")
    traces.append(
      Trace(
        question[rng.integers(2)],
        f"Start at {_ver(anchor)}. {sentence(_ver(answer))} is next to it.",
        f"{_vea(answer)} is nearest.",
        (anchor, answer),
        answer,
      )
    )
  return traces


def _comparisons(scene: Scene, rng: np.random.Generator) -> list[Trace]:
  """ "Which star is the largest?", "Which red object is the smallest?" """
  groups = {kind: (kind, scene.of(kind=kind)) for kind in kinds_of(scene)}
  for colour in sorted({s.colour for s in scene.shapes}):
    groups[f"{colour} object"] = (f"{colour} object", scene.of(colour=colour))
  traces = []
  for noun, members in groups.values():
    for word in ("largest", "smallest"):
      answer = extreme(members, word) if len(members) <= 4 else None
      if answer is None:
        continue
      question = (f"Which {noun} is the {word}?", f"Find the {word} {noun}.")
      traces.append(
        Trace(
          question[rng.integers(2)],
          f"{_introduce(noun, members)} The {answer.cell} one is the {word}.",
          f"{_vea(answer)} is the {word}.",
          tuple(members),
          answer,
        )
      )
  return traces


def _uses(scene: Scene, rng: np.random.Generator) -> list[Trace]:
  """ "Which key opens the lock?", "What does the small key open?"; colours must match."""
  traces = []
  for tool, place, verb, bare in (
    ("key", "lock", "opens", "open"),
    ("plug", "socket", "fits", "fit"),
  ):
    for asked, noun in ((place, tool), (tool, place)):
      pool = scene.of(kind=noun)
      for anchor in scene.of(kind=asked):
        fitting = [s for s in pool if s.colour == anchor.colour]
        if len(fitting) != 1 or not 2 <= len(pool) <= 4:
          continue
        answer, name = fitting[0], scene.name(anchor)
        if noun == tool:
          question = (f"Which {tool} {verb} the {name}?", f"Find the {tool} for the {name}.")
          ending = f"{verb} it."
        else:
          question = (f"What does the {name} {bare}?", f"Find the {place} for the {name}.")
          ending = "is the one." if place == "lock" else "is where it fits."
        traces.append(
          Trace(
            question[rng.integers(2)],
            f"{sentence(_ver(anchor))} is {anchor.colour}. "
            f"{_introduce(noun, pool)} The {answer.cell} one is {anchor.colour} too.",
            f"{_vea(answer)} {ending}",
            (anchor, *pool),
            answer,
          )
        )
  return traces


Lister = Callable[[Scene, np.random.Generator], list[Trace]]

FAMILIES: dict[str, tuple[tuple[float, Lister], ...]] = {
  "#visf": ((1 / 3, _lookups), (2 / 3, _same)),
  "#loc": ((3 / 4, _relations), (1 / 4, _nearest)),
  "#comp": ((1.0, _comparisons),),
  "#func": ((1.0, _uses),),
}
"""Class id -> (share, lister) of its sorts of questions."""
