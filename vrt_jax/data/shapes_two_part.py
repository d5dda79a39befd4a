"""Base-training requests of two parts: an object, and others that are looked for beside it."""

import numpy as np

from vrt_jax.data import shapes_questions as questions
from vrt_jax.data.shapes_refer import Maker, Request, listed, opening_verb
from vrt_jax.data.shapes_scene import Scene, Shape


def _segment_and_list(scene: Scene, rng: np.random.Generator) -> Request | None:
  """An object, then all of a kind: "Segment the blue lock. List the keys." """
  pairs = [
    (anchor, kind)
    for anchor in scene.shapes
    for kind in questions.kinds_of(scene)
    if kind != anchor.kind and 2 <= len(scene.of(kind=kind)) <= 4
  ]
  if not pairs:
    return None
  anchor, kind = pairs[rng.integers(len(pairs))]
  shapes = scene.of(kind=kind)
  return Request(
    f"{opening_verb(rng)} the {scene.name(anchor)}. List the {questions.plural(kind)}.",
    listed((anchor, *shapes)),
    (anchor, *shapes),
    tuple(shapes),
  )


def _segment_related(scene: Scene, rng: np.random.Generator) -> Request | None:
  """An object, then one that is told by it: "Segment the blue lock and the star left of it." """
  anchor = scene.shapes[rng.integers(len(scene.shapes))]
  related: list[tuple[str, Shape]] = []
  for noun in ["object", *questions.kinds_of(scene)]:
    pool = [s for s in scene.shapes if s != anchor and noun in ("object", s.kind)]
    chosen = {
      f"{noun} {relation} it": questions.related(pool, anchor, relation)
      for relation in questions.DIRECTIONS
    }
    chosen[f"{noun} nearest to it"] = questions.nearest(pool, anchor)
    for field in ("colour", "pattern"):
      alike = [s for s in pool if getattr(s, field) == getattr(anchor, field)]
      chosen[f"{noun} that has the same {field}"] = alike[0] if len(alike) == 1 else None
    related += [(phrase, shape) for phrase, shape in chosen.items() if shape and len(pool) > 1]
  if not related:
    return None
  phrase, shape = related[rng.integers(len(related))]
  return Request(
    f"{opening_verb(rng)} the {scene.name(anchor)} and the {phrase}.",
    listed((anchor, shape)),
    (anchor, shape),
  )


TWO_PART_TASKS: tuple[tuple[float, Maker], ...] = (
  (0.2, _segment_and_list),
  (0.2, _segment_related),
)
"""(share, maker) of each task, beside those of `shapes_refer.TASKS`."""
