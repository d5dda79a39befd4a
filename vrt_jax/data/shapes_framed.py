"""Base-training samples with the marks of a trace: what was asked for, and remarks on it."""

import re
from typing import NamedTuple

import numpy as np

from vrt_jax.data import shapes_questions as questions
from vrt_jax.data.shapes_questions import join, sentence
from vrt_jax.data.shapes_refer import TASKS, Request, listed
from vrt_jax.data.shapes_scene import Scene, Shape
from vrt_jax.data.shapes_two_part import TWO_PART_TASKS

FRAMED_TASKS = (*TASKS, *TWO_PART_TASKS)
"""(share, maker) of the requests that `framed` is given."""
_MAX_REMARKED = 4
"""Mentions of a sample that still has room for remarks that nobody asked for."""
_TOLD = 0.9
"""Share of the lists with several mentions whose question tells which one is the answer."""
_TOLD_BY_LOOK = 0.3
"""Share of these where it is told by its own colour, pattern or size."""
_USES = {
  "key": ("opens {} locks", "opens a {} lock"),
  "lock": ("is where a {} key fits", "is the one that a {} key opens"),
  "plug": ("fits {} sockets", "fits a {} socket"),
  "socket": ("is where a {} plug fits", "is the one that a {} plug fits"),
}


class FramedText(NamedTuple):
  """What `framed` makes of a request; `answer` is the shape in <vea>."""

  question: str
  reasoning: str
  answer_caption: str
  answer: Shape


class Told(NamedTuple):
  """A predicate that is true of one shape alone among those in question."""

  predicate: str
  shape: Shape


def _predicates(scene: Scene, shape: Shape) -> list[list[str]]:
  """True predicates of a shape, by sort."""
  names = {other: scene.name(other) for other in scene.shapes if other != shape}
  sorts = [
    [f"is {shape.colour}", f"is {shape.pattern}"],
    [use.format(shape.colour) for use in _USES.get(shape.kind, ())],
    [
      f"is the {word} {noun}" if noun else f"is the {word}"
      for word in ("largest", "smallest")
      for noun, pool in (("", list(scene.shapes)), (shape.kind, scene.of(kind=shape.kind)))
      if questions.extreme(pool, word) == shape
    ],
    [
      f"is {relation} the {name}"
      for other, name in names.items()
      for relation in questions.DIRECTIONS
      if questions.offset(shape, other, relation) >= questions.MARGIN_PX
    ],
    [
      f"is {words} the {name}"
      for other, name in names.items()
      if questions.nearest(list(scene.shapes), other) == shape
      for words in ("nearest to", "next to")
    ],
    [
      f"has the same {field} as the {name}"
      for other, name in names.items()
      for field in ("colour", "pattern")
      if getattr(other, field) == getattr(shape, field)
    ],
  ]
  return [predicates for predicates in sorts if predicates]


def _predicate(scene: Scene, shape: Shape, rng: np.random.Generator) -> str:
  sorts = _predicates(scene, shape)
  chosen = sorts[rng.integers(len(sorts))]
  return chosen[rng.integers(len(chosen))]


def _contrast(first: Shape, second: Shape, rng: np.random.Generator) -> str:
  """ "The B2 one is red, the C4 one too." """
  field = ("colour", "pattern")[rng.integers(2)]
  value, other = getattr(first, field), getattr(second, field)
  rest = f"the {second.cell} one"
  ending = f"{rest} is {other} too" if value == other else f"but {rest} is {other}"
  return f"The {first.cell} one is {value}, {ending}."


def _remark(
  scene: Scene, shapes: tuple[Shape, ...], answer: Shape, rng: np.random.Generator
) -> str:
  if len(shapes) > 1 and rng.random() < 0.3:
    first, second = rng.permutation(len(shapes))[:2]
    return _contrast(shapes[first], shapes[second], rng)
  shape = answer if rng.random() < 0.5 else shapes[rng.integers(len(shapes))]
  subject = "It" if len(shapes) == 1 else f"The {shape.cell} one"
  return f"{subject} {_predicate(scene, shape, rng)}."


def _opening(shapes: tuple[Shape, ...], rng: np.random.Generator) -> str:
  """The mentions as evidence, in one of several wordings."""
  mentions = [f"the {s.located} (<ver>{s.tag}</ver>)" for s in shapes]
  nouns = {s.kind for s in shapes}
  subject = questions.plural(nouns.pop() if len(nouns) == 1 else "object")
  if len(shapes) == 1:
    one = ("It is {}.", "There is {}.", "Start at {}.")
    return one[rng.integers(3)].format(mentions[0])
  several = (
    f"{sentence(', '.join(mentions))}.",
    f"The {subject} are {join(mentions)}.",
    f"Start at {mentions[0]}. Then there is {join(mentions[1:])}.",
  )
  return several[rng.integers(3)]


def _told_by_look(shapes: tuple[Shape, ...]) -> list[Told]:
  told = []
  for fields in ((), ("colour",), ("pattern",), ("size",), ("pattern", "colour")):
    for noun in ("", "one") if fields else ("",):
      phrases = [s.phrase(fields, noun) for s in shapes]
      told += [
        Told(f"is the {phrase}", shape)
        for phrase, shape in zip(phrases, shapes, strict=True)
        if phrases.count(phrase) == 1 and (shape.size or "size" not in fields)
      ]
  return told


def _told_by_size(shapes: tuple[Shape, ...]) -> list[Told]:
  chosen = [(word, questions.extreme(list(shapes), word)) for word in ("largest", "smallest")]
  return [Told(f"is the {word}", shape) for word, shape in chosen if shape]


def _told_by_another(
  scene: Scene, shapes: tuple[Shape, ...], others: list[Shape]
) -> list[list[Told]]:
  """What one of the others tells: by place, by distance, by a shared look."""
  anchors = [(s, scene.name(s)) for s in others]
  places = [
    Told(f"is {relation} the {name}", shape)
    for anchor, name in anchors
    for relation in questions.DIRECTIONS
    if (shape := questions.related(list(shapes), anchor, relation))
  ]
  distances = [
    Told(f"is nearest to the {name}", shape)
    for anchor, name in anchors
    if (shape := questions.nearest(list(shapes), anchor))
  ]
  looks = [
    Told(f"has the same {field} as the {name}", alike[0])
    for anchor, name in anchors
    for field in ("colour", "pattern")
    if len(alike := [s for s in shapes if getattr(s, field) == getattr(anchor, field)]) == 1
  ]
  return [places, distances, looks]


def _tell(scene: Scene, request: Request, rng: np.random.Generator) -> Told | None:
  """Words that are true of one of the candidates alone.

  Another object tells which one it is: one that is mentioned beside them, else any.
  """
  shapes = request.candidates or request.answers
  others = [s for s in request.answers if s not in shapes]
  others = others or [s for s in scene.shapes if s not in shapes]
  by_look = _told_by_look(shapes)
  sorts = [t for t in (_told_by_size(shapes), *_told_by_another(scene, shapes, others)) if t]
  told = by_look if not sorts or rng.random() < _TOLD_BY_LOOK else sorts[rng.integers(len(sorts))]
  return told[rng.integers(len(told))] if told else None


def framed(scene: Scene, request: Request, rng: np.random.Generator) -> FramedText:
  """A request with the marks of a trace but without the steps that lead to what it mentions.

  The mentions become evidence. Where one of several is asked for, a remark says so again and it is
  the answer: "List the keys. Which is the largest?", "The keys are the A2 red key
  (<ver><obj2></ver>) and the B5 plain blue key (<ver><obj1></ver>). The A2 one is the largest." and
  "The A2 red key (<vea><obj2></vea>) is here." Else the answer is the last one and, where there is
  room, remarks say what is true of the mentions.
  """
  shapes, question, answer = request.answers, request.question, request.answers[-1]
  has_room, told = len(shapes) <= _MAX_REMARKED, None
  if request.answer_caption == listed(shapes):
    reasoning = _opening(shapes, rng)
    told = _tell(scene, request, rng) if len(shapes) > 1 and rng.random() < _TOLD else None
  else:
    reasoning = re.sub(r"\((<obj\d+>)\)", r"(<ver>\1</ver>)", request.answer_caption)
  if told:
    answer = told.shape
    question += f" Which {told.predicate}?"
    reasoning += f" The {answer.cell} one {told.predicate}."
  elif has_room:
    reasoning += " " + _remark(scene, shapes, answer, rng)
  endings = [told.predicate] if told else []
  if has_room:
    endings.append(_predicate(scene, answer, rng))
  ending = "is here" if not endings or rng.random() < 0.2 else endings[rng.integers(len(endings))]
  return FramedText(
    question, reasoning, f"The {answer.located} (<vea>{answer.tag}</vea>) {ending}.", answer
  )
