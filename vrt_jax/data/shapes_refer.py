"""Base-training samples of the shapes world: referring segmentation without a trace."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from vrt_jax.data import shapes_questions as questions
from vrt_jax.data.shapes_questions import join, plural, sentence
from vrt_jax.data.shapes_scene import Scene, Shape, in_order

_ENDS = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "bottommost": (0, 1)}
_END_MARGIN_PX = 10.0
_MAX_DESCRIBED = 6
_SIZE_WORDS = {"small": "small", "": "of middle size", "large": "large"}
_ECHO = (
  *("<think>", "</think>", "<answer>", "</answer>", "<ver>", "</ver>", "<vea>", "</vea>"),
  *("reasoning process here", "answers here", "respectively, i.e.,", "in the mind"),
  *("You should first think about the reasoning process", "are enclosed within"),
  *("Please respond with segmentation mask", "Please output the segmentation mask"),
  *("in both the thinking process and the answer.", "provides the user with the answer."),
)


@dataclass(frozen=True)
class Request:
  """A question and the answer in which every mention is a tag in brackets."""

  question: str
  answer_caption: str
  answers: tuple[Shape, ...]
  """In order of mention."""
  candidates: tuple[Shape, ...] = ()
  """Those of the answers that a further question may choose from; all where empty."""


Phrases = list[tuple[str, Shape]]


def _tagged(shape: Shape) -> str:
  return f"the {shape.located} ({shape.tag})"


def listed(shapes: Iterable[Shape]) -> str:
  """ "The B2 plain red key (<obj3>), the C4 small blue lock (<obj1>)." """
  return sentence(", ".join(map(_tagged, shapes))) + "."


def opening_verb(rng: np.random.Generator) -> str:
  """How a request to segment begins."""
  return ("Please segment", "Segment", "Show me")[rng.integers(3)]


def _over_specified(scene: Scene) -> Phrases:
  return [(s.phrase(), s) for s in scene.shapes]


def _single_attributes(scene: Scene) -> Phrases:
  return [
    (s.phrase((field,), "object"), s)
    for s in scene.shapes
    for field in ("colour", "pattern", "size")
    if (field != "size" or s.size) and scene.is_unique(s, (field,), any_kind=True)
  ]


def _superlatives(scene: Scene) -> Phrases:
  phrases = []
  for word in ("largest", "smallest"):
    for noun in ["object", *questions.kinds_of(scene)]:
      pool = [s for s in scene.shapes if noun in ("object", s.kind)]
      chosen = questions.extreme(pool, word)
      if chosen:
        phrases.append((f"{word} {noun}", chosen))
  return phrases


def _ends(scene: Scene) -> Phrases:
  phrases = []
  for word, (along_x, along_y) in _ENDS.items():
    for noun in ["object", *questions.kinds_of(scene)]:
      pool = [s for s in scene.shapes if noun in ("object", s.kind)]
      ranked = sorted(pool, key=lambda s: -along_x * s.x - along_y * s.y)
      if len(ranked) < 2:
        continue
      gap = along_x * (ranked[0].x - ranked[1].x) + along_y * (ranked[0].y - ranked[1].y)
      if gap >= _END_MARGIN_PX:
        phrases.append((f"{word} {noun}", ranked[0]))
  return phrases


def _relations(scene: Scene) -> Phrases:
  phrases = []
  for anchor in scene.shapes:
    for kind in questions.kinds_of(scene):
      pool = scene.of(kind=kind)
      for relation in questions.DIRECTIONS if len(pool) > 1 and anchor.kind != kind else ():
        chosen = questions.related(pool, anchor, relation)
        if chosen:
          phrases.append((f"{kind} {relation} the {scene.name(anchor)}", chosen))
  return phrases


def _nearest(scene: Scene) -> Phrases:
  phrases = []
  for anchor in scene.shapes:
    for noun in ["object", *questions.kinds_of(scene)]:
      pool = [s for s in scene.shapes if noun in ("object", s.kind)]
      chosen = questions.nearest(pool, anchor)
      if chosen:
        phrases.append((f"{noun} nearest to the {scene.name(anchor)}", chosen))
  return phrases


def _same_colour(scene: Scene) -> Phrases:
  phrases = []
  for anchor in scene.shapes:
    for kind in questions.kinds_of(scene):
      pool = [s for s in scene.of(kind=kind, colour=anchor.colour) if s != anchor]
      if kind != anchor.kind and len(pool) == 1 and len(scene.of(kind=kind)) > 1:
        phrases.append((f"{kind} with the colour of the {scene.name(anchor)}", pool[0]))
  return phrases


def _minimal(scene: Scene) -> Phrases:
  return [(scene.name(s), s) for s in scene.shapes]


_PHRASE_SORTS: tuple[tuple[float, Callable[[Scene], Phrases]], ...] = (
  (0.4, _minimal),
  (0.12, _over_specified),
  (0.14, _single_attributes),
  (0.08, _superlatives),
  (0.05, _ends),
  (0.09, _relations),
  (0.06, _nearest),
  (0.06, _same_colour),
)


def _segment(scene: Scene, rng: np.random.Generator) -> Request | None:
  shares = [share for share, _ in _PHRASE_SORTS]
  chosen: Phrases = []
  for _ in range(int(rng.integers(1, 6))):
    phrases = _PHRASE_SORTS[rng.choice(len(shares), p=shares)][1](scene)
    phrases = [p for p in phrases if p[1] not in [s for _, s in chosen]]
    if phrases:
      chosen.append(phrases[rng.integers(len(phrases))])
  if not chosen:
    return None
  return Request(
    f"{opening_verb(rng)} {join([f'the {phrase}' for phrase, _ in chosen])}.",
    listed([s for _, s in chosen]),
    tuple(s for _, s in chosen),
  )


def _list(scene: Scene, rng: np.random.Generator) -> Request | None:
  groups = {kind: scene.of(kind=kind) for kind in questions.kinds_of(scene)}
  for field, values in (
    ("colour", {s.colour for s in scene.shapes}),
    ("pattern", {s.pattern for s in scene.shapes}),
  ):
    for value in sorted(values):
      groups[f"{value} object"] = scene.of(**{field: value})
  nouns = [noun for noun, shapes in groups.items() if 2 <= len(shapes) <= 5]
  if not nouns:
    return None
  noun = nouns[rng.integers(len(nouns))]
  question = (f"List every {noun}.", f"List the {plural(noun)}.", f"Segment every {noun}.")
  return Request(
    question[rng.integers(3)],
    listed(groups[noun]),
    tuple(groups[noun]),
  )


def _describe(scene: Scene, rng: np.random.Generator) -> Request | None:
  shapes = in_order(scene.shapes)
  where = ""
  if len(shapes) > _MAX_DESCRIBED:
    middle = scene.width / 2
    where = (" on the left", " on the right")[rng.integers(2)]
    if any(abs(s.x - middle) < 5 for s in shapes):
      return None
    shapes = [s for s in shapes if (s.x < middle) == (where == " on the left")]
  if not 1 <= len(shapes) <= _MAX_DESCRIBED:
    return None
  return Request(
    f"Describe every object{where}.",
    listed(shapes),
    tuple(shapes),
  )


def _at(scene: Scene, rng: np.random.Generator) -> Request | None:
  count = min(int(rng.integers(2, 6)), len(scene.shapes))
  chosen = [scene.shapes[i] for i in rng.permutation(len(scene.shapes))[:count]]
  cells = [s.cell for s in scene.shapes]
  chosen = [s for s in chosen if cells.count(s.cell) == 1]
  if not chosen:
    return None
  return Request(f"What is at {join([s.cell for s in chosen])}?", listed(chosen), tuple(chosen))


def _attribute(scene: Scene, rng: np.random.Generator) -> Request | None:
  if rng.random() < 0.4:
    return _compare(scene, rng)
  asked, answers, targets = [], [], []
  order = rng.permutation(len(scene.shapes))[: int(rng.integers(1, 4))]
  for shape in (scene.shapes[i] for i in order):
    name = scene.name(shape)
    words = name.split()
    options = [
      (f"What colour is the {name}?", shape.colour, shape.colour not in words),
      (f"What pattern has the {name}?", shape.pattern, shape.pattern not in words),
      (f"What size is the {name}?", _SIZE_WORDS[shape.size], shape.size not in words),
    ]
    open_ones = [(question, value) for question, value, is_open in options if is_open]
    question, value = open_ones[rng.integers(len(open_ones))] if open_ones else ("", "")
    if question:
      asked.append(question)
      answers.append(f"{sentence(_tagged(shape))} is {value}.")
      targets.append(shape)
  return Request(" ".join(asked), " ".join(answers), tuple(targets)) if asked else None


def _compare(scene: Scene, rng: np.random.Generator) -> Request | None:
  first, second = (scene.shapes[i] for i in rng.permutation(len(scene.shapes))[:2])
  names = scene.name(first), scene.name(second)
  if rng.random() < 0.4:
    word = ("larger", "smaller")[rng.integers(2)]
    winner = questions.extreme([first, second], word.replace("er", "est"))
    if winner is None:
      return None
    loser = second if winner == first else first
    question = f"Which is {word}, the {names[0]} or the {names[1]}?"
    ending = f"is {word} than"
  else:
    offsets = {r: questions.offset(first, second, r) for r in questions.DIRECTIONS}
    relation = max(offsets, key=lambda r: offsets[r])
    ranked = sorted(offsets.values())
    if ranked[-1] < questions.MARGIN_PX or ranked[-1] < 1.5 * max(ranked[-2], 1.0):
      return None
    winner, loser = first, second
    question = f"Where is the {names[0]}, seen from the {names[1]}?"
    ending = f"is {relation}"
  text = f"{_tagged(winner)} {ending} {_tagged(loser)}."
  return Request(question, sentence(text), (winner, loser))


def _repeat(scene: Scene, rng: np.random.Generator) -> Request | None:
  words = " ".join(rng.permutation(_ECHO)[: int(rng.integers(2, 5))].tolist())
  if rng.random() < 0.4:
    family = list(questions.FAMILIES.values())[rng.integers(4)]
    traces = family[0][1](scene, rng)
    words = traces[rng.integers(len(traces))].question if traces else words
  shape = scene.shapes[rng.integers(len(scene.shapes))]
  name = scene.name(shape)
  return Request(
    f'Repeat "{words}" and segment the {name}.',
    f"{words} {sentence(_tagged(shape))}.",
    (shape,),
  )


Maker = Callable[[Scene, np.random.Generator], Request | None]

TASKS: tuple[tuple[float, Maker], ...] = (
  (0.3, _segment),
  (0.25, _list),
  (0.2, _describe),
  (0.1, _at),
  (0.12, _attribute),
  (0.03, _repeat),
)
"""(share, maker) of each task; a maker gives None where the scene does not allow it."""
