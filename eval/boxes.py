"""Boxes in the text of a vision-language model, and where in the text they stand.

    There is a lock {"box_2d": [100, 50, 300, 250], "label": "red lock"}.
    <answer>This key [400, 500, 600, 700].</answer>

Models write boxes as JSON, inside a sentence or as a list in a code fence, or as bare lists of four
numbers. Three conventions are in use: `yxyx_1000` (Gemini) and `xyxy_1000` (Qwen3-VL) are shares of
the picture's sides in thousandths, `xyxy_px` (Qwen2.5-VL) are pixels of the picture that was sent.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vrt_jax.data.trace import SEG, Role, mentions

BoxFormat = Literal["yxyx_1000", "xyxy_1000", "xyxy_px"]

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as shares of the picture's width and height, 0 to 1, x0 < x1 and y0 < y1."""

REACH = 400
"""Characters around a list in which the braces of its JSON object are looked for."""

_LIST = re.compile(r"\[([^\[\]{}]{0,200})\]")
_NUMBER = re.compile(
  r"\s*+[\"']?\s*+([+-]?(?:\d++\.?\d*+|\.\d++)(?:e[+-]?\d++)?)\s*+[\"']?\s*+", re.I | re.A
)
_BOX_KEY = re.compile(r"[\"']\w{0,20}?box\w{0,20}[\"']\s{0,9}:\s{0,9}((?:\[\s{0,9}){0,4})", re.I)
_KEY_BEFORE = re.compile(r"[\"'](\w{1,40})[\"']\s{0,9}:\s{0,9}$")
_LABEL = re.compile(
  r"[\"'](?:label|name|object|phrase|caption|description)[\"']\s{0,9}:\s{0,9}"
  r"(?:(\"(?:[^\"\\]|\\.){0,200}\")|'([^']{0,200})')"
)
_KEY_REACH = 64


@dataclass(frozen=True)
class TextBox:
  """One box of a text."""

  box: Box
  role: Role
  """As of a [SEG] in its place: before the answer span reasoning, inside it answer, else none."""
  phrase: str
  """The label of its JSON object, else the noun phrase before it, "" where there is none."""
  text_span: tuple[int, int]
  """[start, end) characters of the phrase and the box, with its JSON object."""


@dataclass(frozen=True)
class ParsedText:
  """The boxes of a text in order, and how many were passed over."""

  boxes: list[TextBox]
  malformed: int
  """Lists of numbers that are not four, and box keys without a list of four numbers."""
  empty: int
  """Boxes without area inside the picture."""


def find_boxes(text: str, box_format: BoxFormat, sent_size: tuple[int, int]) -> ParsedText:
  """Every box of `text`; `sent_size` is (height, width) of the picture that the model was sent.

  Numbers may be floats or strings. Coordinates beyond the picture are clamped, corners sorted. A
  list behind a key is a box where the key says so (box_2d, bbox_2d, bbox, ..), as "color": [..]
  does not. Takes time linear in the text.

  >>> find_boxes('a key {"box_2d": [100, 50, 300, "250"]}', "yxyx_1000", (40, 60)).boxes
  [TextBox(box=(0.05, 0.1, 0.25, 0.3), role='none', phrase='a key', text_span=(0, 39))]
  >>> find_boxes("<answer>it [30, 10, 15, 20]</answer>", "xyxy_px", (40, 60)).boxes[0].box
  (0.25, 0.25, 0.5, 0.5)
  >>> fenced = '```json\\n[{"bbox_2d": [0, 0, 500, 2000], "label": "lock"}, {"bbox_2d": [1]}]\\n```'
  >>> found = find_boxes(fenced, "xyxy_1000", (40, 60))
  >>> found.boxes[0].box, found.boxes[0].phrase, found.malformed
  ((0.0, 0.0, 0.5, 1.0), 'lock', 1)
  """
  lists, malformed = _lists_of_four(text)
  boxes, spans, labels = [], [], []
  for values, span, label in _with_objects(text, lists):
    box = to_shares(values, box_format, sent_size)
    if box is not None:
      boxes.append(box)
      spans.append(span)
      labels.append(label)
  found = [
    TextBox(box, role, label or phrase, whole)
    for box, label, (role, phrase, whole) in zip(boxes, labels, _places(text, spans), strict=True)
  ]
  return ParsedText(found, malformed, empty=len(lists) - len(boxes))


def to_shares(
  values: tuple[float, ...], box_format: BoxFormat, sent_size: tuple[int, int]
) -> Box | None:
  """Four numbers of a model as a box; None where no area is left inside the picture.

  >>> to_shares((100, 50, 300, 250), "yxyx_1000", (40, 60))
  (0.05, 0.1, 0.25, 0.3)
  >>> to_shares((50, 100, 250, 1300), "xyxy_1000", (40, 60))
  (0.05, 0.1, 0.25, 1.0)
  >>> to_shares((45, 30, 15, -3), "xyxy_px", (40, 60))
  (0.25, 0.0, 0.75, 0.75)
  >>> to_shares((1200, 0, 1300, 9), "xyxy_1000", (40, 60)) is None
  True
  """
  a, b, c, d = values
  height, width = sent_size if box_format == "xyxy_px" else (1000, 1000)
  if box_format == "yxyx_1000":
    a, b, c, d = b, a, d, c
  x0, x1 = sorted(min(max(x / width, 0.0), 1.0) for x in (a, c))
  y0, y1 = sorted(min(max(y / height, 0.0), 1.0) for y in (b, d))
  return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def writable(text: str) -> str:
  """`text` with "?" for what UTF-8 cannot hold: JSON may spell halves of surrogate pairs.

  >>> writable("a" + chr(0xD800))
  'a?'
  """
  return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class _List:
  """A list of four finite numbers and its place [start, end)."""

  values: tuple[float, ...]
  start: int
  end: int


def _lists_of_four(text: str) -> tuple[list[_List], int]:
  """The lists that are boxes, and the number of malformed ones."""
  lists, malformed = [], 0
  for match in _LIST.finditer(text):
    before = text[max(0, match.start() - _KEY_REACH) : match.start()]
    key = _KEY_BEFORE.search(before)
    if key and "box" not in key.group(1).lower():
      continue
    parts = match.group(1).split(",")
    values = _numbers(parts)
    if values is not None and len(values) == 4:
      lists.append(_List(values, *match.span()))
    elif not key and len(parts) > 2 and _NUMBER.fullmatch(parts[0]):
      malformed += 1
  starts = {item.start for item in lists}
  for match in _BOX_KEY.finditer(text):
    opening = match.start(1) + match.group(1).rfind("[")
    has_objects = text[match.end() : match.end() + 1] == "{"
    malformed += opening not in starts and not has_objects
  return lists, malformed


def _numbers(parts: list[str]) -> tuple[float, ...] | None:
  """All parts as finite numbers, or None."""
  values = []
  for part in parts:
    match = _NUMBER.fullmatch(part)
    if not match or not math.isfinite(value := float(match.group(1))):
      return None
    values.append(value)
  return tuple(values)


def _with_objects(
  text: str, lists: list[_List]
) -> Iterator[tuple[tuple[float, ...], tuple[int, int], str]]:
  """(numbers, span, label) of every list; the span is that of its JSON object, where it has one.

  Its object is the nearest pair of braces with no other brace or box in between.
  """
  for i, item in enumerate(lists):
    low = max(lists[i - 1].end if i else 0, item.start - REACH)
    high = min(lists[i + 1].start if i + 1 < len(lists) else len(text), item.end + REACH)
    opening = text.rfind("{", low, item.start)
    closing = text.find("}", item.end, high)
    alone = (
      opening >= 0
      and closing >= 0
      and text.find("}", opening, item.start) < 0
      and text.find("{", item.end, closing) < 0
    )
    if alone:
      yield item.values, (opening, closing + 1), _label(text[opening : closing + 1])
    else:
      yield item.values, (item.start, item.end), ""


def _label(json_object: str) -> str:
  """The name that a JSON object gives, "" where it has none."""
  match = _LABEL.search(json_object)
  if not match:
    return ""
  if match.group(1) is None:
    return match.group(2).strip()
  try:
    label = json.loads(match.group(1), strict=False)
  except json.JSONDecodeError:  # an escape that JSON does not know
    label = match.group(1)[1:-1]
  return writable(label).strip()


def _places(text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[Role, str, tuple[int, int]]]:
  """(role, phrase, span with the phrase) of every box, by the rules for a [SEG] in its place."""
  pieces, marks = [], []
  length = end = 0
  for start, stop in spans:
    pieces += [text[end:start].replace(SEG, SEG.lower()), SEG]
    marks.append(length + start - end)
    length, end = marks[-1] + len(SEG), stop
  pieces.append(text[end:].replace(SEG, SEG.lower()))
  found = mentions("".join(pieces))
  for mention, mark, (start, stop) in zip(found, marks, spans, strict=True):
    before, after = mark - mention.text_span[0], mention.text_span[1] - mark - len(SEG)
    yield mention.role, mention.phrase, (start - before, stop + after)
