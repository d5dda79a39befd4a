"""Boxes in texts: formats, places, roles, and texts that no model should write."""

import doctest
import random
import time

import pytest

from eval import boxes
from eval.boxes import find_boxes, to_shares

SIZE = (40, 60)


def shares(text: str, box_format: boxes.BoxFormat = "xyxy_1000") -> list[tuple[float, ...]]:
  return [found.box for found in find_boxes(text, box_format, SIZE).boxes]


def test_examples_of_the_docstrings():
  result = doctest.testmod(boxes)
  assert result.attempted > 8 and result.failed == 0


@pytest.mark.parametrize(
  ("box_format", "values"),
  [
    ("yxyx_1000", [250, 100, 750, 500]),
    ("xyxy_1000", [100, 250, 500, 750]),
    ("xyxy_px", [6, 10, 30, 30]),
  ],
)
def test_three_formats_of_one_box(box_format, values):
  assert shares(f"a key {values}", box_format) == [(0.1, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
  "text",
  [
    "[100, 250, 500, 750]",
    "[ 100.0,250 ,\n5e2, +750.]",
    '["100", "250", "500", "750"]',
    "['100', '250', '500', '750']",
    "[[100, 250, 500, 750]]",
    '{"box_2d": [100, 250, 500, 750]}',
    "{'bbox': [100, 250, 500, 750], 'label': 'key'}",
    '{"objects": [{"name": "key", "place": {"bbox_2d": [100, 250, 500, 750]}}]}',
    '{"bounding_box": [100, 250, 500, 750]}',
    '```json\n[\n  {"bbox_2d": [100, 250, 500, 750]}\n]\n```',
    '{"bbox_2d": [[100, 250, 500, 750]]}',
    "[500, 750, 100, 250]",
    '{"bbox_2d": [100, 250, 500, 750], "color": [0, 0, 9, 9], "point": [3, 4], "size": [1, 2, 3]}',
  ],
)
def test_ways_to_write_a_box(text):
  found = find_boxes(text, "xyxy_1000", SIZE)
  assert [item.box for item in found.boxes] == [(0.1, 0.25, 0.5, 0.75)]
  assert (found.malformed, found.empty) == (0, 0)


@pytest.mark.parametrize(
  ("text", "malformed", "empty"),
  [
    ('{"box_2d": [1, 2, 3]}', 1, 0),
    ('{"box_2d": [1, 2, "x", 4]}', 1, 0),
    ('{"box_2d": []} {"bbox_2d": null} {"bbox": "1,2,3,4"}', 3, 0),
    ('{"box_2d": [1, 2, 3', 1, 0),
    ("[1, 2, 3] and [1, 2, 3, 4, 5] and [1, 2, 3, four]", 3, 0),
    ("[1, 2, 3, 1e999] [1_0, 2, 3, 4] [1, 2, 3, 4%]", 2, 0),
    ("[5, 5, 5, 9] [0, 2000, 9, 3000] [-9, 0, -1, 9]", 0, 3),
    ("see [1], [2, 3] and [a, b, c, d]; []", 0, 0),
    ('{"boxes": [{"color": [1, 2, 3, 4]}]}', 0, 0),
  ],
)
def test_what_is_no_box(text, malformed, empty):
  found = find_boxes(text, "xyxy_1000", SIZE)
  assert (found.boxes, found.malformed, found.empty) == ([], malformed, empty)


def test_a_bad_box_does_not_hide_the_others():
  text = (
    '[{"bbox_2d": [1, 2]}, {"bbox_2d": [0, 0, 500, 500]}, {"bbox_2d": [0, 0, 0, 0]}, [0, 0, 9, 9]]'
  )
  found = find_boxes(text, "xyxy_1000", SIZE)
  assert len(found.boxes) == 2 and (found.malformed, found.empty) == (1, 1)


def test_coordinates_are_clamped():
  assert shares("[-50, 500, 1500, 2000]") == [(0.0, 0.5, 1.0, 1.0)]
  assert shares("[-5, 20, 70, 1e300]", "xyxy_px") == [(0.0, 0.5, 1.0, 1.0)]
  assert to_shares((0, 0, 60, 40), "xyxy_px", SIZE) == (0.0, 0.0, 1.0, 1.0)


TEXT = """<think>A lock {"box_2d": [0, 0, 100, 100], "label": "red lock"} and the star
[100, 100, 200, 200] are there.</think>
<answer>The small key {"box_2d": [200, 200, 300, 300]}
```json
[{"box_2d": [300, 300, 400, 400], "label": "b \\"q\\""}, {"box_2d": [0, 0, 9, 9], "label": 'c'}]
```</answer> not [500, 500, 600, 600]"""


def test_roles_phrases_and_places():
  found = find_boxes(TEXT, "yxyx_1000", SIZE).boxes
  assert [item.role for item in found] == ["reasoning"] * 2 + ["answer"] * 3 + ["none"]
  assert [item.phrase for item in found] == [
    "red lock", "the star", "The small key", 'b "q"', "c", "not",
  ]  # fmt: skip
  parts = [TEXT[slice(*item.text_span)] for item in found]
  assert parts[0] == 'A lock {"box_2d": [0, 0, 100, 100], "label": "red lock"}'
  assert parts[1] == "the star\n[100, 100, 200, 200]"
  assert parts[2] == 'The small key {"box_2d": [200, 200, 300, 300]}'
  assert parts[4] == '{"box_2d": [0, 0, 9, 9], "label": \'c\'}'


def test_without_a_closed_answer_no_box_has_a_role():
  found = find_boxes("<answer>a key [1, 2, 3, 4]", "xyxy_1000", SIZE).boxes
  assert [item.role for item in found] == ["none"]


def test_a_text_with_marks_of_masks():
  found = find_boxes("[SEG] <answer>a key [1, 2, 3, 4] [SEG]</answer>", "xyxy_1000", SIZE).boxes
  assert [(item.role, item.phrase) for item in found] == [("answer", "a key")]


def test_two_boxes_of_one_object_have_their_own_places():
  text = '{"label": "keys", "bbox_2d": [[0, 0, 9, 9], [5, 5, 9, 9]]}'
  found = find_boxes(text, "xyxy_1000", SIZE).boxes
  assert [text[slice(*item.text_span)] for item in found] == ["[0, 0, 9, 9]", "[5, 5, 9, 9]"]


def test_labels_can_be_written_to_a_file():
  text = '{"bbox": [0, 0, 9, 9], "label": "a\\ud800b"} {"bbox": [0, 0, 9, 9], "label": "a\\q"}'
  assert [b.phrase for b in find_boxes(text, "xyxy_1000", SIZE).boxes] == ["a?b", "a\\q"]


PIECES = [
  *"[]{}(),:\"'` \n\\-.e09",
  *('"box_2d": ', "'bbox': ", '"bbox_2d"', '"label": "', "<answer>", "</answer>", "<ver>", "[SEG]"),
  *("[1, 2, 3, 4]", '["1", "2", "3", "4"]', "[1,2,3]", "```json", "NaN", "1e999", "٣", "\ud800"),
  *('{"box_2d": [9, 9, 99, 99], "label": "key"}', "and", "the red key", "<obj1>", "</p>", "<p>"),
]


def test_random_texts():
  rng = random.Random(0)
  total = 0
  for i in range(4000):
    text = "".join(rng.choices(PIECES, k=rng.randrange(40)))
    found = find_boxes(text, ("yxyx_1000", "xyxy_1000", "xyxy_px")[i % 3], SIZE)
    end = 0
    for item in found.boxes:
      x0, y0, x1, y1 = item.box
      assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
      start, stop = item.text_span
      assert end <= start < stop <= len(text) and "[" in text[start:stop]
      end = stop
    total += len(found.boxes)
  assert total > 2000


LONG = (
  "[",
  "{",
  "[[1,2,3,4]",
  "[1,2,3,4] and ",
  "[1," + " " * 190 + "]",
  "[" + "a" * 198,
  "1" * 150,
  "(" * 50 + "[1,2,3,4]",
  '{"box_2d":[1,2,3,4]',
  '{"bbox":[1,2,3,4],"a":{',
  '}{"label":"' + "x" * 150 + '","bbox":[1,2,3,4]',
  '"box_2d": [',
  '"' + "box" * 6,
  '"label": "',
  '"label":"\\',
  "<answer>",
  "[SEG]",
)


@pytest.mark.parametrize("piece", LONG)
def test_long_texts_take_linear_time(piece):
  """A quadratic step would take minutes."""
  text = piece * (200_000 // len(piece))
  start = time.perf_counter()
  find_boxes(text, "xyxy_1000", SIZE)
  assert time.perf_counter() - start < 5
