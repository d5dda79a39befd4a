"""The overlay picture."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from vrt_jax.draw import WIDTH, draw_overlay
from vrt_jax.ops.masks import encode_rle
from vrt_jax.text_panel import (
  Word,
  _lines,
  clean,
  font_of,
  object_colour,
  paragraphs,
  word_width,
)


@dataclass(frozen=True)
class Seg:
  index: int
  role: str
  phrase: str
  text_span: tuple[int, int]
  object_number: int | None


def scene(width: int, height: int, count: int):
  """Grey picture, trace, mentions and box masks."""
  pieces, mentions, masks, at = ["<think>"], [], [], 7
  for i in range(count):
    phrase, tail = f"a box {i}", f" (<ver><obj{i + 1}> [SEG]</ver>)"
    mentions.append(Seg(i, "reasoning", phrase, (at, at + len(phrase + tail)), i + 1))
    pieces += [phrase, tail, " and "]
    at += len(phrase + tail + " and ")
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, (i * width) // (count + 1) :][:, : max(1, width // 9)] = True
    masks.append(mask)
  text = "".join(pieces) + "</think>\n\n<answer>none</answer><|im_end|>"
  return Image.new("RGB", (width, height), (128, 128, 128)), text, mentions, masks


@pytest.mark.parametrize(
  ("width", "height", "count"),
  [(192, 192, 3), (640, 427, 40), (600, 1500, 2), (2250, 1500, 1), (2000, 400, 2), (64, 48, 0)],
)
def test_every_size_and_number_of_masks(width, height, count):
  image, text, mentions, masks = scene(width, height, count)
  start = time.perf_counter()
  overlay = draw_overlay(image, "Which box?", text, mentions, masks)
  assert time.perf_counter() - start < 30
  assert overlay.mode == "RGB" and overlay.width == WIDTH and 200 < overlay.height < 4000
  pixels = {colour for _, colour in overlay.getcolors(1 << 24)}
  assert all(object_colour(i) in pixels for i in range(count))


def test_rles_draw_like_dense_masks():
  image, text, mentions, masks = scene(100, 80, 2)
  dense = draw_overlay(image, "q", text, mentions, masks)
  rles = draw_overlay(image, "q", text, mentions, [encode_rle(m) for m in masks])
  assert dense.tobytes() == rles.tobytes()


def test_fewer_or_more_masks_than_mentions_and_empty_masks():
  image, text, mentions, masks = scene(100, 80, 3)
  draw_overlay(image, "q", text, mentions, masks[:1])
  draw_overlay(image, "q", text, mentions[:1], masks)
  draw_overlay(image, "", "", [], [np.zeros((80, 100), bool)])


def test_mask_of_another_size_raises():
  image, text, mentions, masks = scene(100, 80, 1)
  with pytest.raises(ValueError, match="mask size: "):
    draw_overlay(image, "q", text, mentions, [masks[0].T])


def test_tags_are_not_shown_and_phrases_are_coloured():
  _, text, mentions, _ = scene(10, 10, 2)
  colours = {("object", 1): (1, 0, 0), ("object", 2): (2, 0, 0)}
  (first, words), (second, answer) = paragraphs(text, mentions, colours)
  assert (first, second) == ("Reasoning", "Answer")
  assert [w.text for w in words if w.colour == (1, 0, 0)] == ["a", " ", "box", " ", "0", "1"]
  assert words[-2].text == "and" and words[-2].colour is None
  assert [w.text for w in words if w.badge] == ["1", "2"]
  assert [w.text for w in answer if w.text != " "] == ["none"]
  assert clean("<p>x</p> (<vea><obj12> [SEG]</vea>)<|im_end|>") == "x "


def test_a_repeated_object_keeps_its_colour():
  text = "one [SEG] two [SEG]"
  mentions = [Seg(0, "none", "one", (0, 9), 4), Seg(1, "none", "two", (10, 19), 4)]
  colours = {("object", 4): (1, 2, 3)}
  ((_, words),) = paragraphs(text, mentions, colours)
  assert {w.colour for w in words if w.badge} == {(1, 2, 3)}


def test_lines_are_never_wider_than_the_panel():
  font = font_of(20)
  words = [Word(piece) for piece in ["short", " ", "x" * 400, " ", "end"]]
  for line in _lines(words, font, 200):
    assert sum(word_width(word, font) for chunk in line for word in chunk) <= 202


def test_colours_differ():
  assert len({object_colour(i) for i in range(40)}) == 40
