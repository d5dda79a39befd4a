"""What a page gets of a trace, and the page around it."""

import json
import re

import numpy as np

from vrt_jax.metrics import PredictedMask
from vrt_jax.ops.masks import decode_rle
from vrt_jax.viewer.view import json_script, page, shown_size, small_rle, target_view, trace_view

TEXT = (
  "<think>A box (<ver><obj3> [SEG]</ver>), see.</think>\n\n<answer>It (<vea>[SEG]</vea>).</answer>"
)
MASK = np.zeros((40, 60), bool)
MASK[10:20, 30:50] = True
OBJECTS = [
  PredictedMask(MASK, "reasoning", 0, "A box", (7, TEXT.index(", see")), 3),
  PredictedMask(MASK, "answer", 1, "It", (TEXT.index("It ("), TEXT.index(".</answer>"))),
]


def test_text_and_masks_of_a_trace():
  view = trace_view(TEXT, OBJECTS, (20, 30))
  assert [section["heading"] for section in view["sections"]] == ["Reasoning", "Answer"]
  assert view["sections"][0]["pieces"] == [["A box ", 0], [", see."]]
  assert view["sections"][1]["pieces"][0][1] == 1
  assert [(m["role"], m["badge"], m["label"]) for m in view["masks"]] == [
    ("reasoning", "3", "A box"),
    ("answer", "2", "It"),
  ]
  assert len({m["colour"] for m in view["masks"]}) == 2
  small = decode_rle(view["masks"][0]["rle"])
  np.testing.assert_array_equal(small, MASK[::2, ::2])
  assert json.loads(json.dumps(view)) == view


def test_a_mask_without_words_is_still_shown():
  text = "<answer>(<vea>[SEG]</vea>)</answer>"
  view = trace_view(text, [PredictedMask(MASK, "answer", 0, "", (8, 26), None)], (20, 30))
  assert ["", 0] in view["sections"][0]["pieces"] and view["masks"][0]["label"] == "mask 1"


def test_a_text_without_masks():
  assert trace_view("nothing <b>here</b>", [], (4, 4)) == {
    "size": [4, 4],
    "sections": [{"heading": "", "pieces": [["nothing <b>here</b>"]]}],
    "masks": [],
  }
  assert trace_view("", [], (4, 4))["sections"] == []


def test_targets_and_sizes():
  (target,) = target_view([MASK], [0.123456], "answer", (40, 60))
  assert (target["role"], target["iou"]) == ("answer", 0.1235)
  np.testing.assert_array_equal(decode_rle(target["rle"]), MASK)
  np.testing.assert_array_equal(decode_rle(small_rle(MASK, (10, 15))), MASK[::4, ::4])
  assert shown_size((1500, 2250), 560) == (373, 560)
  assert shown_size((3, 5), 560) == (3, 5) and shown_size((1, 5000), 100) == (1, 100)


def test_no_text_leaves_its_script():
  text = "</script><!--<script>\u2028"
  script = json_script("data", {"a": text})
  assert script.count("<") == 2 and "\u2028" not in script
  assert json.loads(re.search(r">(.*)</script>", script, re.DOTALL)[1]) == {"a": text}


def test_a_page_names_no_other_server():
  text = page("<b>", "<p>x</p>")
  assert "<title>&lt;b&gt;</title>" in text and "default-src 'none'" in text
  assert "http:" not in text and "https:" not in text and "showTrace" in text
