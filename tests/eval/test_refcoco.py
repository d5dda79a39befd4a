"""Referring segmentation: reading COCO-format data, the numbers, resuming."""

import dataclasses
import json

import numpy as np
import pytest

from eval import refcoco
from eval.refcoco import Args, evaluate, overlap, read_expressions, summary
from tests.pictures import encoded, picture
from tests.train import processes
from vrt_jax.config import MeshConfig
from vrt_jax.data.image import decode_image
from vrt_jax.data.trace import mentions
from vrt_jax.generate.predictor import Prediction
from vrt_jax.ops.masks import encode_rle

WIDTH, HEIGHT = 40, 20


def box(x: int, width: int, number: int) -> dict:
  corners = [x, 0, x + width, 0, x + width, HEIGHT, x, HEIGHT]
  return {"id": number, "image_id": 1, "category_id": 1, "segmentation": [corners]}


def ref(number: int, ann_id, *sentences: str, split: str = "val", **fields) -> dict:
  return {
    "ref_id": number,
    "image_id": 1,
    "ann_id": ann_id,
    "split": split,
    "sentences": [{"sent": s} for s in sentences],
  } | fields


REFS = [
  ref(7, 1, "left half", "half"),
  ref(8, [1, 2], "everything"),
  ref(9, [-1], "nothing"),
  ref(10, 2, "other", split="test"),
]


@pytest.fixture
def args(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(encoded(picture(WIDTH, HEIGHT)))
  instances = {
    "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
    "annotations": [box(0, 20, 1), box(20, 20, 2)],
    "categories": [{"id": 1, "name": "box"}],
  }
  (tmp_path / "instances.json").write_text(json.dumps(instances))
  (tmp_path / "refs.json").write_text(json.dumps(REFS))
  return Args(
    refs=tmp_path / "refs.json",
    instances=tmp_path / "instances.json",
    images=tmp_path / "images",
    out=tmp_path / "out",
  )


class LeftQuarter:
  """In the place of `Predictor`: two masks whose union is the left quarter; none for "nothing"."""

  def __init__(self, loaded=None, config=None, *, thinking=True, mesh=None):
    assert not thinking and mesh is None
    self.asked = []

  def predict(self, requests):
    for request in requests:
      self.asked.append(request.question)
      image = decode_image(request.image)
      count = 0 if "nothing" in request.question else 2
      masks = np.zeros((count, image.height, image.width), bool)
      masks[:1, :, :6], masks[1:, :, 4:10] = True, True
      text = "(<vea><obj1> [SEG]</vea>)" * count
      yield Prediction(text, mentions(text), masks, [0.5] * count, truncated=False)


def test_every_sentence_of_the_split_with_the_union_of_its_objects(args):
  found = read_expressions(args)
  assert [(e.key, e.sentence) for e in found] == [
    ("7-0", "left half"),
    ("7-1", "half"),
    ("8-0", "everything"),
    ("9-0", "nothing"),
  ]
  areas = [overlap(e.target, e.target)[0] for e in found]
  assert areas == [400, 400, 800, 0]


def test_a_hand_computed_summary():
  numbers = summary([(30, 60), (0, 40), (90, 100), (0, 0), (0, 50)], [False] * 3 + [True] * 2)
  assert numbers["ciou"] == pytest.approx(120 / 250)
  assert numbers["giou"] == pytest.approx((0.5 + 0 + 0.9 + 1 + 0) / 5)
  assert numbers["precision@0.5"] == pytest.approx(1 / 3)  # 0.5 itself is not above
  assert numbers["precision@0.9"] == 0 and numbers["no_target_accuracy"] == 0.5
  assert summary([], [])["ciou"] == 0


def test_overlap_equals_counted_pixels():
  rng = np.random.default_rng(0)
  one, other = rng.random((2, 30, 40)) < 0.4
  expected = int((one & other).sum()), int((one | other).sum())
  assert overlap(encode_rle(one), other) == expected


def test_from_data_to_numbers(args, monkeypatch):
  monkeypatch.setattr(refcoco, "Predictor", LeftQuarter)
  results = evaluate(args)
  assert results["metrics"]["giou"] == pytest.approx((0.5 + 0.5 + 0.25 + 1) / 4)
  assert results["metrics"]["ciou"] == pytest.approx(600 / 1600)
  assert results["expressions"] == 4 and len(results["config_hash"]) == 12
  written = json.loads((args.out / "refcoco_results.json").read_text())
  assert written == results and not (args.out / "partial.jsonl").exists()


def test_a_killed_run_goes_on(args, monkeypatch, tmp_path):
  predictor = LeftQuarter(thinking=False)
  monkeypatch.setattr(refcoco, "Predictor", lambda *given, **settings: predictor)
  straight = evaluate(args)
  asked = list(predictor.asked)
  predictor.asked.clear()
  (args.out / "refcoco_results.json").unlink()
  real = refcoco._entry

  def stops(answer, target):
    if len(predictor.asked) == 3:
      raise KeyboardInterrupt
    return real(answer, target)

  with monkeypatch.context() as patch:
    patch.setattr(refcoco, "_entry", stops)
    with pytest.raises(KeyboardInterrupt):
      evaluate(args)
  args.refs.write_text(json.dumps([ref(7, 1, "another", "half"), *REFS[1:]]))
  with pytest.raises(ValueError, match="belongs to other settings"):  # answers to other questions
    evaluate(args)
  args.refs.write_text(json.dumps(REFS))
  predictor.asked.clear()
  assert evaluate(args) == straight
  assert predictor.asked == asked[2:]


@pytest.mark.parametrize(
  ("refs", "message"),
  [
    ("{", "is not JSON"),
    ("{}", "is not a JSON list"),
    ("[]", "no expressions of the split"),
    ([{"split": "val"}], "entry 0: no 'image_id'"),
    ([ref(1, 99, "x")], "entry 0: there is no annotation 99"),
    ([ref(1, 1, "x", image_id=5)], "entry 0: the COCO file has no image 5"),
    ([ref(1, 1, sentences=[3])], "entry 0: "),
  ],
)
def test_malformed_data_is_named(args, refs, message):
  args.refs.write_text(refs if isinstance(refs, str) else json.dumps(refs))
  with pytest.raises(ValueError, match=message):
    read_expressions(args)


def test_a_mesh_has_the_devices_that_there_are(args):
  with pytest.raises(ValueError, match="does not fit"):
    evaluate(dataclasses.replace(args, mesh=MeshConfig(data=3)))


@pytest.mark.slow
@pytest.mark.parametrize("together", ["four devices", "two processes"])
def test_many_devices_are_one_run(args, tmp_path, together):
  def start(name, variables=None):
    words = ["--refs", args.refs, "--instances", args.instances, "--images", args.images]
    words += ["--out", tmp_path / name, "--max-new-tokens", 40, "--batch-size", 4]
    return processes.start_module("eval.refcoco", *map(str, words), variables=variables)

  (one,) = [processes.finish(start("one"))]
  assert one[0] == 0 and "cIoU " in one[1], one[2]
  machines = [processes.FOUR_DEVICES] if together == "four devices" else processes.rendezvous(2)
  runs = [start("many", variables) for variables in machines]
  leader, *followers = map(processes.finish, runs)
  assert leader[0] == 0 and "cIoU " in leader[1], leader[2]
  for status, printed, errors in followers:
    assert status == 0 and "cIoU " not in printed, errors
  results, expected = (
    json.loads((tmp_path / name / refcoco.RESULTS_FILE).read_text()) for name in ("many", "one")
  )
  assert [s["text"] for s in results["samples"]] == [s["text"] for s in expected["samples"]]
  assert results["metrics"] == pytest.approx(expected["metrics"], abs=1e-3)
