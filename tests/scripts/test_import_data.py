"""import_data: both record layouts, all problems at once, nothing half-written."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from scripts import import_data
from scripts.annotations.questions import parse_entry
from tests.own_data import (
  HEIGHT,
  WIDTH,
  entry,
  run,
  shape,
  write_coco,
  write_labelme,
  write_masks,
  write_pictures,
)
from tests.pictures import encoded, picture
from vrt_jax import cli
from vrt_jax.data.checks import check_train_record
from vrt_jax.data.records import EvalRecord
from vrt_jax.data.sources import eval_source, train_source


@pytest.fixture
def folder(tmp_path) -> Path:
  return write_pictures(tmp_path)


def test_the_training_layout(folder, capsys):
  write_coco(folder)
  sample = entry({"<obj3>": 10, "<obj7>": 11}, key="mine")
  answer = {**entry({"<obj1>": 20}, image="b.png")}
  del answer["reasoning"]
  lines = "\n".join(json.dumps(e) for e in (sample, answer)) + "\n\n"
  path = run(folder, "coco", lines, "coco.json")
  assert "2 train records, 1 of them answers without reasoning" in capsys.readouterr().out
  first, second = train_source(path)
  facts = check_train_record(first)
  assert (first.key, facts.height, facts.width) == ("mine", HEIGHT, WIDTH)
  assert (facts.objects, facts.mentions) == (2, 3)
  candidate = first.annotation["generated_ver_data"]["candidates"][0]
  assert candidate["answer_objects"] == ["<obj3>"]
  assert candidate["question"] == sample["question"]
  assert candidate["reasoning"] == sample["reasoning"]
  assert candidate["answer_caption"] == sample["answer"]
  assert first.annotation["image_name"] == "sub/a.jpg"
  assert check_train_record(second, thinking=False).objects == 1
  with pytest.raises(ValueError, match="missing text: reasoning"):
    check_train_record(second)


def test_the_evaluation_layout(folder):
  write_coco(folder)
  sample = entry({"<obj3>": 10, "<obj7>": 11, "<obj8>": 12}, class_ids=["#loc"], confidence=4)
  sample["reasoning"] = "First (<ver><obj7></ver>), then (<ver><obj3></ver>, <obj7>)."
  path = run(folder, "coco", [sample], "coco.json", kind="eval")
  (record,) = eval_source(path)
  assert isinstance(record, EvalRecord)
  assert (record.reasoning_ids, record.answer_ids) == (["7", "3"], ["3"])
  assert record.class_ids == ["#loc"] and record.confidence == 4
  assert set(record.objects) == {"3", "7", "8"}
  assert record.objects["3"]["caption"] == "cup" and record.objects["3"]["original_id"] == "<obj3>"
  assert (record.reference_reasoning, record.reference_answer) == (
    sample["reasoning"],
    sample["answer"],
  )


def failure(folder: Path, *args: object, **options: object) -> str:
  """The message of a command that fails and leaves nothing behind."""
  with pytest.raises(ValueError) as error:
    run(folder, *args, **options)
  assert not list(folder.glob("*.tfrecord")) and not list(folder.glob(".*"))
  return str(error.value)


def test_every_problem_is_listed(folder):
  write_coco(folder)
  (folder / "images/bad.jpg").write_bytes(b"no picture")
  cut = encoded(picture(WIDTH, HEIGHT), "JPEG")[:-40]
  (folder / "images/cut.jpg").write_bytes(cut)
  good = entry({"<obj1>": 10})
  entries = [
    good,
    good | {"colour": "red", "confidence": "high"},
    {"image": "b.png", "objects": {}},
    good | {"answer": "That one.", "objects": {"obj1": 10}},
    good | {"answer": "<obj4>"},
    good | {"image": "none.jpg"},
    good | {"image": "bad.jpg"},
    good | {"image": "cut.jpg"},
    good | {"objects": {"<obj1>": 99, "<obj2>": 20, "<obj3>": "cup", "<obj4>": []}},
    good | {"answer": "<obj1> [SEG]"},
    good | {"key": "k"},
    good | {"key": "k"},
    "text",
  ]
  message = failure(folder, "coco", entries, "coco.json")
  for part in (
    "entry 2: unknown field colour, the fields are image, question,",
    "entry 2: confidence is not a int",
    "entry 3: has no question",
    "entry 3: has no answer",
    "entry 4: objects: 'obj1' is not of the form <obj1>",
    "entry 4: the answer mentions no object",
    "entry 5: <obj4> is not in objects",
    "none.jpg: No such file",
    "bad.jpg: corrupt image",
    "cut.jpg: corrupt image",
    "entry 9: <obj1>: there is no annotation 99",
    "entry 9: <obj2>: annotation 20 belongs to 'b.png'",
    "entry 9: <obj3>: 'cup' is not an annotation id",
    "entry 9: <obj4>: an empty list",
    "entry 10: seg in text",
    "key 'k' is given twice",
    "entry 13: is not an object",
  ):
    assert part in message
  assert not any(f"entry {i}:" in message for i in (1, 11, 12))
  # 4 mentions <obj1> in its texts, which it does not define
  assert message.startswith(f"{message.count('; ') + 1} problems in ")


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    ([], "an empty list of polygons"),
    ([[1, 2, 3, 4]], "at least three points"),
    ([[1, 2, 3, 4, 5, 6, 7]], "at least three points"),
    ([[1, 2, 3, 4, 5, None]], "at least three points"),
    ([[100, 100, 120, 100, 120, 120]], "the mask is empty"),
    ({"size": [3, 4], "counts": [12]}, "the mask has 4x3 pixels, the picture 56x40"),
    ({"size": [HEIGHT, WIDTH], "counts": [1]}, "the runs do not fill"),
    (None, "neither a list of polygons nor an RLE"),
  ],
)
def test_bad_coco_segmentations(folder, segmentation, message):
  annotation = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": segmentation}
  write_coco(folder, annotations=[annotation])
  assert message in failure(folder, "coco", [entry({"<obj1>": 1})], "coco.json")


def test_bad_coco_files(folder):
  entries = [entry({"<obj1>": 10})]
  write_coco(folder, images=[{"id": 1, "file_name": "sub/a.jpg", "height": WIDTH, "width": HEIGHT}])
  message = failure(folder, "coco", entries, "coco.json")
  assert "40x56 pixels, the picture 56x40: save the picture upright, EXIF" in message
  write_coco(folder, images=[])
  assert "no image with file_name 'sub/a.jpg'" in failure(folder, "coco", entries, "coco.json")
  write_coco(folder, categories=[])
  assert "is of category 3, which" in failure(folder, "coco", entries, "coco.json")
  write_coco(folder, annotations=[{"id": 1}, {"id": 1}])
  assert "several annotations have the same id" in failure(folder, "coco", entries, "coco.json")
  write_coco(folder, annotations=[{}])
  assert "an entry without 'id'" in failure(folder, "coco", entries, "coco.json")
  (folder / "coco.json").write_text("[]")
  assert "has no list 'images'" in failure(folder, "coco", entries, "coco.json")


@pytest.mark.parametrize(
  ("reference", "message"),
  [
    ("cap", "there is no label 'cap', the labels are half, line, twin"),
    ("twin", "'twin' names several objects: give a place, one of [0, 1]"),
    (9, "there is no shape 9, the places are 0 to 3"),
    (1.5, "neither a label nor the place"),
    ("line", "shape_type 'line' is not one of polygon, rectangle, circle"),
    (3, "a rectangle has 2 points, not 1"),
  ],
)
def test_bad_labelme_objects(folder, reference, message):
  twin = shape("twin", "rectangle", (1, 1), (9, 9))
  write_labelme(folder, twin, twin, shape("line", "line"), shape("half", "rectangle", (1, 1)))
  assert message in failure(folder, "labelme", [entry({"<obj1>": reference})], "shapes")


def test_bad_labelme_files(folder):
  entries = [entry({"<obj1>": "a"})]
  (folder / "shapes").mkdir()
  assert "a.json does not exist" in failure(folder, "labelme", entries, "shapes")
  write_labelme(folder, shape("a", "circle", (1, 1), (9, 9)), height=41)
  assert "a.json has 56x41 pixels, the picture 56x40" in failure(
    folder, "labelme", entries, "shapes"
  )
  (folder / "shapes/sub/a.json").write_text('{"shapes": 3}')
  assert "is not a LabelMe file" in failure(folder, "labelme", entries, "shapes")


@pytest.mark.parametrize(
  ("reference", "message"),
  [
    ("none.png", "none.png does not exist"),
    ("rgb.png", "rgb.png has colours (RGB)"),
    ("small.png", "small.png has 5x4 pixels, the picture 56x40"),
    ("text.png", "text.png is not a picture"),
    ("zero.png", "the mask is empty"),
    (3, "no pixel of a.png has the value 3, there are 1, 2, 200"),
    (0, "no pixel of a.png has the value 0"),
    (None, "neither a mask file nor a value"),
  ],
)
def test_bad_png_masks(folder, reference, message):
  write_masks(folder)
  picture(WIDTH, HEIGHT).save(folder / "pngs/rgb.png")
  Image.new("L", (5, 4), 1).save(folder / "pngs/small.png")
  Image.new("L", (WIDTH, HEIGHT)).save(folder / "pngs/zero.png")
  (folder / "pngs/text.png").write_text("no PNG")
  assert message in failure(folder, "masks", [entry({"<obj1>": reference})], "pngs")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "holds no entry"),
    ("[]", "holds no entry"),
    ("[{]", "is not JSON"),
    ('{"image": 1}\n{"im', "line 2: is not JSON"),
  ],
)
def test_bad_question_files(folder, text, message):
  write_coco(folder)
  assert message in failure(folder, "coco", text, "coco.json")


def test_bad_input_ends_with_one_line(folder, capsys):
  write_coco(folder)
  (folder / "q.json").write_text(json.dumps([entry({"<obj1>": 99, "<obj2>": 98})]))
  paths = {"questions": "q.json", "images": "images", "annotations": "coco.json", "out": "own"}
  args = ["--format", "coco", *(x for k, v in paths.items() for x in (f"--{k}", str(folder / v)))]

  def lines(*changed: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
      cli.run(lambda: import_data.main(cli.parse(import_data.Args, [*args, *changed], "import")))
    assert stop.value.code == 1
    return [line for line in capsys.readouterr().err.splitlines() if line and "samples" not in line]

  before = sorted(os.listdir(folder))
  (line,) = lines()
  assert line.startswith("error: 2 problems in ") and "<obj2>: there is no annotation 98" in line
  (line,) = lines("--annotations", str(folder / "none.json"))
  assert line.startswith("error: ") and "none.json" in line
  (line,) = lines("--out", str(folder / "coco.json"))
  assert "coco.json exists" in line
  (line,) = lines("--out", str(folder / "no/own.tfrecord"))
  assert "the folder of --out" in line
  (line,) = lines("--format", "voc")
  assert "invalid choice 'voc'" in line
  assert sorted(os.listdir(folder)) == before


def test_the_example_of_the_document_is_sound():
  document = Path(__file__).resolve().parents[2] / "docs" / "own_data.md"
  example = document.read_text().partition("```json\n")[2].partition("```")[0]
  question, problems = parse_entry(json.loads(example))
  assert problems == [] and question.objects["<obj2>"] == [23, 24]
  assert set(json.loads(example)) == {field.name for field in dataclasses.fields(question)}
