"""Tags, roles and prompts of the reasoning trace."""

import re
import time

import pytest

from vrt_jax.data import trace

TEXT = (
  "<think>A young boy (<ver><obj1> [SEG]</ver>) on a sidewalk (<ver><obj2> [SEG]</ver>).</think>"
  "\n\n<answer>The beige cap (<vea><obj4> [SEG]</vea>) collects money.</answer><|im_end|> [SEG]"
)


def annotation(**candidate) -> dict:
  base = {
    "question": "What is used to collect money?",
    "reasoning": "A boy (<ver><obj7></ver>) and a cap (<ver><obj3></ver>);"
    " the boy (<ver><obj7></ver>)",
    "answer_caption": "The cap (<vea><obj3></vea>) and the coin (<vea><obj10></vea>).",
    "answer_objects": ["<obj3>", "<obj10>"],
  }
  base.update(candidate)
  objects = {f"<obj{i}>": {"segmentation": {}, "caption": ""} for i in (3, 7, 10)}
  return {
    "generated_ver_data": {"candidates": [base]},
    "original_annotation": {"objects_anns": objects},
  }


def test_seg_roles():
  assert trace.seg_roles(TEXT) == ([0, 1], [2])
  assert trace.seg_roles("[SEG] <answer>[SEG]") == ([], [])
  assert trace.seg_roles("") == ([], [])
  assert trace.seg_roles("</answer>[SEG]<answer>[SEG]</answer>") == ([0], [1])


def test_seg_roles_of_several_answers():
  text = "[SEG]<answer>[SEG]</answer>[SEG]<answer>[SEG]</answer>"
  assert trace.seg_roles(text) == ([0], [1])
  assert trace.seg_roles(text, "none") == ([], [])
  assert trace.seg_roles(TEXT, "none") == ([0, 1], [2])
  with pytest.raises(ValueError, match='"first" or "none"'):
    trace.seg_roles(text, "last")


def test_answer_spans_equal_the_non_greedy_pattern():
  pieces = ["<answer>", "</answer>", "[SEG]", "\n"]
  for code in range(4**5):
    text = "".join(pieces[code // 4**i % 4] for i in range(5))
    spans = [match.span() for match in re.finditer(r"<answer>.*?</answer>", text, re.DOTALL)]
    assert trace.answer_spans(text) == spans


def test_training_example_renumbers_over_the_whole_target():
  user_text, target, tags = trace.training_example(annotation())
  assert target == (
    "<think>A boy (<ver><obj1> [SEG]</ver>) and a cap (<ver><obj2> [SEG]</ver>);"
    " the boy (<ver><obj1> [SEG]</ver>)</think>\n\n"
    "<answer>The cap (<vea><obj2> [SEG]</vea>) and the coin (<vea><obj3> [SEG]</vea>).</answer>"
  )
  assert tags == ["<obj7>", "<obj3>", "<obj7>", "<obj3>", "<obj10>"]
  assert user_text == (
    "<image>\nWhat is used to collect money?\n\n"
    "You should first think about the reasoning process in the mind and then provides the user "
    "with the answer. Please respond with segmentation mask in both the thinking process and the "
    "answer.\n\n"
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answers here "
    "</answer>."
  )


def test_training_example_second_prompt_and_no_thinking():
  user_text, _, _ = trace.training_example(annotation(), think_prompt=1)
  assert "Please output the segmentation mask in both the thinking process" in user_text
  with pytest.raises(ValueError, match=r"think_prompt must be 0 \.\. 1, not 2"):
    trace.training_example(annotation(), think_prompt=2)
  assert trace.training_example(annotation(), thinking=False) == (
    "<image>\nWhat is used to collect money?",
    "The cap (<obj1> [SEG]) and the coin (<obj2> [SEG]).",
    ["<obj3>", "<obj10>"],
  )


@pytest.mark.parametrize(
  "sample, reason",
  [
    ({}, "no candidates"),
    ({"generated_ver_data": {"candidates": []}}, "no candidates"),
    (annotation(reasoning=None), "missing text"),
    (annotation(answer_caption="a <obj99>"), "unknown tag"),
    (annotation(answer_caption="cap [SEG]"), "seg in text"),
    (annotation(reasoning="a", answer_caption="b"), "no mask mention"),
    (annotation() | {"original_annotation": {}}, "no objects"),
  ],
)
def test_unusable_samples_name_the_reason(sample, reason):
  with pytest.raises(ValueError, match=f"^{reason}: "):
    trace.training_example(sample)


def test_evaluation_user_text():
  training, _, _ = trace.training_example(annotation(question="Q?"))
  assert trace.evaluation_user_text("Q?") == training
  expected = "<image>\nQ?\n\nPlease respond with segmentation mask."
  assert trace.evaluation_user_text("Q?", thinking=False) == expected


def test_mentions():
  found = trace.mentions(TEXT)
  assert [(m.index, m.role, m.phrase, m.object_number) for m in found] == [
    (0, "reasoning", "A young boy", 1),
    (1, "reasoning", "a sidewalk", 2),
    (2, "answer", "The beige cap", 4),
    (3, "none", "", None),
  ]
  spans = [TEXT[slice(*m.text_span)] for m in found]
  assert spans[0] == "A young boy (<ver><obj1> [SEG]</ver>)"
  assert spans[2] == "The beige cap (<vea><obj4> [SEG]</vea>)"


@pytest.mark.parametrize(
  "text, phrases",
  [
    ("In it, the boy on the left (<obj1> [SEG])", ["the boy on the left"]),
    ("She sits next to the back of the car (<ver><obj1> [SEG]</ver>)", ["the back of the car"]),
    ("Both are in the third bag from the left (<obj1> [SEG])", ["the third bag from the left"]),
    ("The man is holding keys (<obj1> [SEG]).", ["keys"]),
    ("Look at the <p>red bag</p> [SEG]", ["red bag"]),
    ("two cups (<ver><obj1> [SEG]</ver>, <ver><obj2> [SEG]</ver>)", ["two cups", "two cups"]),
    ("[SEG][SEG]", ["", ""]),
    ("<ver>dogs <obj1> [SEG]</ver> and a cat (<obj2> [SEG])", ["dogs", "a cat"]),
  ],
)
def test_phrases(text, phrases):
  assert [m.phrase for m in trace.mentions(text)] == phrases


def test_malformed_text_is_never_fatal_or_slow():
  junk = [
    "(<ver><obj [SEG]",
    "<obj" + "9" * 6000 + "> [SEG]",
    "<p>[SEG]</p> [SEG] </p> [SEG]",
    "<answer>" * 20000 + "[SEG]",
    "(<ver><obj1> [SEG]" * 5000,
    "(" * 20000 + " " * 20000 + "[SEG]",
    "<" * 20000 + "[SEG]",
    "[SEG]" * 5000 + "<answer>",
    "x" * 100000 + "[SEG]",
    "\x00\ufffd\u2028[SEG]<obj\u0663>[SEG]",
  ]
  start = time.perf_counter()
  for text in junk:
    found = trace.mentions(text)
    assert len(found) == text.count("[SEG]")
    ends = [0] + [m.text_span[1] for m in found]
    assert all(
      ends[m.index] <= m.text_span[0] < m.text_span[1] <= len(text)
      and text[slice(*m.text_span)].count("[SEG]") == 1
      for m in found
    )
  assert time.perf_counter() - start < 5
