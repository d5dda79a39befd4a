import collections
import io
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from vrt_jax.data import records, shapes, shapes_framed
from vrt_jax.data import shapes_questions as questions
from vrt_jax.data.shapes_scene import (
  COLOURS,
  KINDS,
  PATTERNS,
  Scene,
  Shape,
  draft_scene,
  in_order,
  is_held_out,
)
from vrt_jax.metrics import match_ious, summarize

NUM_TEXTS = 400


@pytest.fixture(scope="module")
def traces():
  rng = np.random.default_rng(0)
  return [shapes.trace_text(rng, "eval") for _ in range(NUM_TEXTS)]


def test_held_out_share():
  all_of = [(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS]
  held_out = [c for c in all_of if is_held_out(c)]
  assert 1 / 10 < len(held_out) / len(all_of) < 1 / 6
  assert {c[0] for c in held_out} == set(KINDS)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_scenes(split):
  rng = np.random.default_rng(1)
  for _ in range(15):
    scene = shapes.make_scene(rng, split)
    image, masks = shapes.render(scene)
    assert image.shape == (scene.height, scene.width, 3) and image.dtype == np.uint8
    assert 4 <= len(scene.shapes) == len(masks) <= 10
    assert np.sum(masks, 0).max() == 1
    assert min(m.sum() for m in masks) >= 120
    assert any(is_held_out(s.combination) for s in scene.shapes) == (split == "eval")
    assert len({scene.name(s) for s in scene.shapes}) == len(scene.shapes)
    assert sorted(s.number for s in scene.shapes) == list(range(1, len(scene.shapes) + 1))


def test_unknown_split():
  with pytest.raises(ValueError, match="unknown split"):
    shapes.make_scene(np.random.default_rng(0), "test")


def test_names():
  key = Shape("key", "blue", "plain", 14, x=10, number=1)
  other = Shape("key", "blue", "striped", 20, x=50, number=2)
  star = Shape("star", "red", "plain", 27, x=90, number=3)
  scene = Scene(100, 100, (key, other, star), 0)
  assert [scene.name(s) for s in scene.shapes] == ["plain key", "striped key", "star"]
  assert star.phrase() == "large plain red star"


def test_cells_divide_the_picture_into_six_by_six():
  for i in range(20):
    scene = draft_scene(np.random.default_rng((5, i)), "train")
    for shape in scene.shapes:
      column, row = "ABCDEF".index(shape.cell[0]), int(shape.cell[1]) - 1
      assert column <= 6 * shape.x / scene.width < column + 1
      assert row <= 6 * shape.y / scene.height < row + 1
      assert shape.located == f"{shape.cell} {shape.phrase()}"
    ordered = [s.cell for s in in_order(scene.shapes)]
    assert ordered == sorted(ordered)


def test_solvers_refuse_doubt():
  anchor = Shape("lock", "red", "plain", 20, x=100, y=100, number=1)

  def star(x, number, radius=20.0):
    return Shape("star", "red", "plain", radius, x=x, y=100, number=number)

  left, right = star(50, 2), star(150, 3)
  assert questions.related([left, right], anchor, "left of") == left
  assert questions.related([left, star(95, 4)], anchor, "left of") is None
  assert questions.related([left, star(60, 4)], anchor, "left of") is None
  assert questions.extreme([star(0, 5, 27), star(0, 6, 20)], "largest").number == 5
  assert questions.extreme([star(0, 5, 22), star(0, 6, 20)], "largest") is None
  assert questions.nearest([left, star(180, 4)], anchor) == left
  assert questions.nearest([left, right], anchor) is None


def test_families_and_evidence(traces):
  families = collections.Counter(family for _, _, family in traces)
  assert set(families) == {"#visf", "#loc", "#comp", "#func"}
  assert min(families.values()) > 0.18 * NUM_TEXTS
  assert np.mean([len(t.evidence) >= 2 for _, t, _ in traces]) >= 2 / 3
  for scene, trace, _ in traces:
    assert 1 <= len(trace.evidence) <= 5 and trace.answer in trace.evidence
    assert re.findall("<ver>(<obj\\d+>)</ver>", trace.reasoning) == [s.tag for s in trace.evidence]
    assert re.findall("<vea>(<obj\\d+>)</vea>", trace.answer_caption) == [trace.answer.tag]
    assert len(trace.reasoning.split()) <= 48
    assert set(trace.evidence) <= set(scene.shapes)


def test_answers_are_balanced(traces):
  for axis in ("x", "y"):
    sides = {"x": "width", "y": "height"}
    thirds = [int(3 * getattr(t.answer, axis) / getattr(s, sides[axis])) for s, t, _ in traces]
    assert np.bincount(thirds, minlength=3).min() > 0.22 * NUM_TEXTS
  sizes = collections.Counter(t.answer.size for _, t, _ in traces)
  assert min(sizes.values()) > 0.22 * NUM_TEXTS
  for count in (3, 4):
    order = [t.evidence.index(t.answer) for _, t, _ in traces if len(t.evidence) == count]
    assert np.bincount(order, minlength=count).max() < 0.65 * len(order)


def test_largest_object_is_a_poor_guess(traces):
  largest = [t.answer == max(s.shapes, key=lambda q: q.radius) for s, t, _ in traces]
  assert np.mean(largest) < 0.2


def test_answering_with_the_largest_object_scores_low():
  samples = []
  for i in range(200):
    _, labelled = shapes.trace_sample(np.random.default_rng((12, i)), "eval")
    masks = {key: coco_mask.decode(info["mask"]) for key, info in labelled.objects.items()}
    largest = max(masks.values(), key=lambda mask: mask.sum())
    answer_ious = match_ious([largest], [masks[key] for key in labelled.answer_ids])
    samples.append({"reasoning_ious": [], "answer_ious": answer_ious, "class_ids": []})
  assert 0.02 < summarize(samples)["metrics"]["answer_miou"] < 0.2


def test_questions_hold(traces):
  for _, trace, family in traces:
    if family == "#func":
      pool = [s for s in trace.evidence[1:] if s.colour == trace.evidence[0].colour]
      assert pool == [trace.answer]
    if family == "#comp":
      radii = sorted(s.radius for s in trace.evidence)
      assert trace.answer.radius == radii["largest" in trace.question and -1]
    mentioned = re.sub(r" \(<\w+><obj\d+></\w+>\)", "", trace.reasoning).lower()
    assert all(s.located.lower() in mentioned for s in trace.evidence)


def test_trace_sample():
  train, labelled = shapes.trace_sample(np.random.default_rng(3), "eval", "k")
  candidate = train.annotation["generated_ver_data"]["candidates"][0]
  objects = train.annotation["original_annotation"]["objects_anns"]
  assert candidate["question"] == labelled.question and train.image == labelled.image
  assert candidate["answer_objects"] == [f"<obj{i}>" for i in labelled.answer_ids]
  assert list(objects) == [f"<obj{i}>" for i in labelled.objects]
  size = Image.open(io.BytesIO(train.image)).size
  for info in objects.values():
    mask = coco_mask.decode(info["segmentation"])
    assert mask.shape == size[::-1] and mask.sum() >= 120


def test_refer_samples():
  rng = np.random.default_rng(4)
  for _ in range(60):
    scene, request = shapes.refer_text(rng, "train")
    tags = re.findall(r"\((<obj\d+>)\)", request.answer_caption)
    assert tags == [s.tag for s in request.answers] and 1 <= len(tags) <= 7
    assert set(request.answers) <= set(scene.shapes)
  record = shapes.refer_sample(rng, "train")
  candidate = record.annotation["generated_ver_data"]["candidates"][0]
  assert candidate["reasoning"] == "" and candidate["answer_objects"]


def test_two_part_requests():
  kinds = set()
  for i in range(60):
    rng = np.random.default_rng((12, i))
    scene, request = shapes.refer_text(rng, "train", in_frame=True)
    anchor, *rest = request.answers
    if match := re.fullmatch(r".+ the ([\w ]+)\. List the (\w+)\.", request.question):
      assert match[1] == scene.name(anchor) and request.candidates == tuple(rest)
      assert rest == scene.of(kind=rest[0].kind) and match[2] == questions.plural(rest[0].kind)
      kinds.add("list")
    if match := re.fullmatch(r".+ and the (\w+) (\w+) of it\.", request.question):
      pool = [s for s in scene.shapes if s != anchor and match[1] in ("object", s.kind)]
      said = f"is {match[2]} of the {scene.name(anchor)}"
      assert [s for s in pool if is_true(said, s, pool, scene)] == rest
      kinds.add(match[2])
  assert kinds == {"list", "left", "right"}


def test_framed_requests_have_the_marks_of_a_trace():
  for i in range(20):
    _, request = shapes.refer_text(np.random.default_rng((13, i)), "train", in_frame=True)
    record = shapes.refer_sample(np.random.default_rng((13, i)), "train", in_frame=True)
    candidate = record.annotation["generated_ver_data"]["candidates"][0]
    assert candidate["question"].startswith(request.question)
    mentions = [s.tag for s in request.answers]
    assert re.findall(r"\(<ver>(<obj\d+>)</ver>\)", candidate["reasoning"]) == mentions
    answers = re.findall(r"\(<vea>(<obj\d+>)</vea>\)", candidate["answer_caption"])
    assert candidate["answer_objects"] == answers and len(answers) == 1
    told = candidate["question"] != request.question
    assert answers[0] in mentions if told else answers == mentions[-1:]
    objects = record.annotation["original_annotation"]["objects_anns"]
    for tag in mentions:
      assert re.search(rf"{objects[tag]['caption']} \(<ver>{tag}</ver>\)", candidate["reasoning"])
    assert objects[answers[0]]["caption"] in candidate["answer_caption"]


def is_true(predicate: str, shape: Shape, pool: Sequence[Shape], scene: Scene) -> bool:
  """Whether a predicate holds for a shape; comparisons are with the others of the pool."""
  named = [s for s in scene.shapes if predicate.endswith(f"the {scene.name(s)}")]
  if match := re.fullmatch(r"is the (largest|smallest)(?: (\w+))?", predicate):
    rivals = [s for s in pool if match[2] in (None, s.kind)]
    return shape == (max if match[1] == "largest" else min)(rivals, key=lambda s: s.radius)
  if match := re.match(r"is (left of|right of|above|below) the", predicate):
    axis = "x" if match[1] in ("left of", "right of") else "y"
    sign = -1 if match[1] in ("left of", "above") else 1
    return sign * (getattr(shape, axis) - getattr(named[0], axis)) > 0
  if match := re.match(r"has the same (colour|pattern)", predicate):
    return getattr(named[0], match[1]) == getattr(shape, match[1])
  if re.match(r"is (nearest to|next to) the", predicate):
    others = [s for s in pool if s != named[0]]
    return shape == min(others, key=lambda s: np.hypot(s.x - named[0].x, s.y - named[0].y))
  if predicate.startswith("is the ") and "that a" not in predicate:
    return set(predicate.split()[2:]) - {"one"} <= set(shape.phrase().split())
  return predicate == "is here" or shape.colour in predicate or predicate == f"is {shape.pattern}"


def test_framed_questions_tell_the_answer():
  places, sorts = set(), set()
  for i in range(300):
    rng = np.random.default_rng((15, i))
    scene, request = shapes.refer_text(rng, "train", in_frame=True)
    text = shapes_framed.framed(scene, request, rng)
    match = re.fullmatch(r" Which (.+)\?", text.question.removeprefix(request.question))
    if not match:
      assert text.answer == request.answers[-1]
      continue
    said, mentions = match[1], request.candidates or request.answers
    assert [s for s in mentions if is_true(said, s, mentions, scene)] == [text.answer]
    assert text.reasoning.endswith(f" The {text.answer.cell} one {said}.")
    places.add((mentions.index(text.answer), len(mentions)))
    sorts.add(" ".join(said.split()[:3]))
  assert {(0, 3), (1, 3), (2, 3)} <= places
  assert {"is the largest", "is left of", "is nearest to", "has the same"} <= sorts


def test_framed_remarks_are_true():
  sorts = set()
  for i in range(300):
    rng = np.random.default_rng((14, i))
    scene, request = shapes.refer_text(rng, "train", in_frame=True)
    question, _, answer, last = shapes_framed.framed(scene, request, rng)
    said = answer.split("</vea>) ")[1].rstrip(".")
    told, pool = question.endswith(f"{said}?"), request.candidates or request.answers
    assert is_true(said, last, pool if told else scene.shapes, scene)
    sorts.add(said.split(last.colour)[0][:11])
  assert len(sorts) > 12


def test_write_shapes(tmp_path):
  paths = shapes.write_shapes(tmp_path / "a", 5, 2, seed=7, num_shards=2, workers=1, progress=False)
  assert [pathlib.Path(p).name for p in paths] == [
    "shapes_train-00000-of-00002.tfrecord",
    "shapes_train-00001-of-00002.tfrecord",
    "shapes_eval.tfrecord",
  ]
  train = list(records.read_train_records(str(tmp_path / "a" / "shapes_train-*")))
  assert len({r.key for r in train}) == 5
  assert len(list(records.read_eval_records(paths[2]))) == 2
  again = shapes.write_shapes(tmp_path / "b", 3, 0, seed=7, workers=1, progress=False)
  assert list(records.read_train_records(again)) == train[:3]
  other = shapes.write_shapes(tmp_path / "c", 1, 0, seed=8, workers=1, progress=False)
  assert next(records.read_train_records(other)).image != train[0].image


def test_write_shapes_refuses(tmp_path):
  with pytest.raises(ValueError, match="unknown task"):
    shapes.write_shapes(tmp_path, 1, 0, 0, task="other")
  with pytest.raises(ValueError, match="no evaluation layout"):
    shapes.write_shapes(tmp_path, 1, 1, 0, task="refer")
  with pytest.raises(ValueError, match="do not fill"):
    shapes.write_shapes(tmp_path, 1, 0, 0, num_shards=2)


def test_corpus():
  texts = shapes.corpus(6, 0)
  assert texts == shapes.corpus(6, 0) and len(texts) == 12
  assert any("<think>" in text for text in texts)
