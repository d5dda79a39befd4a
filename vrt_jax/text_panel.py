"""The text panel of the overlay picture: coloured phrases, number badges, wrapped lines."""

import colorsys
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from PIL import Image, ImageDraw, ImageFont

TEXT_SIZES = (25, 23, 21, 19)

PAPER = (255, 255, 255)
INK = (38, 42, 51)
FAINT = (122, 129, 143)
LINE = (226, 229, 234)

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont

PALETTE: tuple[Colour, ...] = (
  (214, 48, 49),
  (9, 113, 206),
  (15, 143, 88),
  (226, 113, 6),
  (132, 68, 196),
  (0, 142, 156),
  (213, 50, 136),
  (140, 96, 40),
  (88, 122, 8),
  (61, 76, 190),
)

_TAGS = re.compile(r"</?(?:think|answer|ver|vea|p|vp)>|<obj\d+>|\[SEG\]|<\|im_end\|>|<image>")
_EMPTY_BRACKETS = re.compile(r"\(\s*\)")
_CUT_BRACKET = re.compile(r"\(\s*$|^\s*\)")


class Mention(Protocol):
  """What is read of one [SEG] of the text."""

  @property
  def index(self) -> int:
    """Number of the [SEG] in the text, from 0."""
    ...

  @property
  def role(self) -> str:
    """Of its mask: "reasoning", "answer" or "none"."""
    ...

  @property
  def phrase(self) -> str:
    """The words that its mask belongs to."""
    ...

  @property
  def text_span(self) -> tuple[int, int]:
    """[start, end) characters of its phrase and markup."""
    ...

  @property
  def object_number(self) -> int | None:
    """N of `<objN>`, None without one."""
    ...


class Word:
  """A word of the text panel: its colour marks a phrase, a badge is a number in a filled box."""

  def __init__(self, text: str, colour: Colour | None = None, badge: bool = False):
    self.text, self.colour, self.badge = text, colour, badge


MentionT = TypeVar("MentionT", bound=Mention)
Paragraph = tuple[str, list[Word]]


def object_colour(position: int) -> Colour:
  """The colour of the position-th object (from 0): the palette, then hues by the golden angle."""
  if position < len(PALETTE):
    return PALETTE[position]
  hue = (position * 0.618034) % 1.0
  lightness = (0.3, 0.36, 0.42)[position % 3]
  red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.72)
  return round(255 * red), round(255 * green), round(255 * blue)


def _object_id(mention: Mention) -> tuple[str, int]:
  if mention.object_number is None:
    return "mention", mention.index
  return "object", mention.object_number


def object_colours(mentions: Sequence[Mention]) -> dict[tuple[str, int], Colour]:
  """The colour of each object, in order of mention; mentions without number stand alone."""
  ids = dict.fromkeys(_object_id(m) for m in mentions)
  return {key: object_colour(i) for i, key in enumerate(ids)}


def colour_of(mention: Mention | None, colours: Mapping[tuple[str, int], Colour]) -> Colour:
  """The colour of a mention's object; grey for a mask that no mention names."""
  return FAINT if mention is None else colours[_object_id(mention)]


def badge_of(mention: Mention) -> str:
  """The number shown for a mention: N of `<objN>`, else its place in the text from 1."""
  number = mention.object_number
  return str(mention.index + 1 if number is None else number)


@functools.cache
def font_of(size: int) -> Font:
  """Pillow's built-in font at a size in pixels."""
  font = ImageFont.load_default(size=size)
  assert isinstance(font, Font)  # as every build of Pillow with FreeType has it
  return font


def clean(text: str) -> str:
  """Text without tags and without the brackets that they leave empty."""
  return _EMPTY_BRACKETS.sub("", _TAGS.sub("", text))


def _sections(text: str) -> list[tuple[str, int, int]]:
  """(heading, start, end) of the trace and the answer; one without heading for plain text."""
  start = text.find("<answer>")
  if "<think>" not in text and start < 0:
    return [("", 0, len(text))]
  if start < 0:
    return [("Reasoning", 0, len(text))]
  close = text.find("</answer>", start)
  end = len(text) if close < 0 else close
  return [("Reasoning", 0, start), ("Answer", start, end), ("", end, len(text))]


def pieces(
  text: str, mentions: Sequence[MentionT]
) -> list[tuple[str, list[tuple[str, MentionT | None]]]]:
  """(heading, pieces) of each section that has text: words without tags, and whose phrase they are.

  A mention whose span overlaps one before it, or crosses a section's end, is plain text.
  """
  ordered = sorted(mentions, key=lambda m: m.text_span[0])
  found = []
  for heading, start, end in _sections(text):
    parts: list[tuple[str, MentionT | None]] = []
    at = start
    for mention in ordered:
      first, last = mention.text_span
      if first < at or last > end or first >= last:
        continue
      parts.append((clean(text[at:first]), None))
      parts.append((_CUT_BRACKET.sub("", clean(text[first:last])), mention))
      at = last
    parts.append((clean(text[at:end]), None))
    if any(mention or part.strip() for part, mention in parts):
      found.append((heading, parts))
  return found


def paragraphs(
  text: str, mentions: Sequence[Mention], colours: Mapping[tuple[str, int], Colour]
) -> list[Paragraph]:
  """The sections of the text as words, those of a mention in its colour and with its badge."""
  found = []
  for heading, parts in pieces(text, mentions):
    words: list[Word] = []
    for part, mention in parts:
      if mention is None:
        _append(words, part)
        continue
      colour = colour_of(mention, colours)
      _append(words, part, colour)
      words += [Word(" "), Word(badge_of(mention), colour, badge=True)]
    found.append((heading, words))
  return found


def _append(words: list[Word], text: str, colour: Colour | None = None) -> None:
  """Splits text into words and spaces (one " " for any white space)."""
  pieces = re.findall(r"\s+|\S+", text.rstrip() if colour is not None else text)
  words += [Word(" " if piece.isspace() else piece, colour) for piece in pieces]


def _chunks(words: Sequence[Word]) -> list[list[Word]]:
  """Words that must stay on one line: a phrase's last word with its badge and punctuation."""
  chunks: list[list[Word]] = [[]]
  for i, word in enumerate(words):
    before_badge = i + 1 < len(words) and words[i + 1].badge and i > 0 and words[i - 1].text != " "
    if word.text == " " and not before_badge:
      chunks.append([])
    else:
      chunks[-1].append(word)
  return [chunk for chunk in chunks if any(word.text != " " for word in chunk)]


def word_width(word: Word, font: Font) -> float:
  """Width of a word in pixels, a badge with its margin."""
  if word.badge:
    return font_of(round(font.size * 0.68)).getlength(word.text) + 0.56 * font.size
  if word.text == " ":
    return font.size * 0.2
  return font.getlength(word.text) + (1 if word.colour is not None else 0)


def _split_long(chunk: list[Word], font: Font, width: int) -> list[list[Word]]:
  """A chunk wider than a line, cut into single pieces that fit."""
  if sum(word_width(word, font) for word in chunk) <= width:
    return [chunk]
  pieces = []
  for word in chunk:
    rest = word.text
    while not word.badge and font.getlength(rest) + 1 > width and len(rest) > 1:
      keep = len(rest)
      while keep > 1 and font.getlength(rest[:keep]) + 1 > width:
        keep = keep * 4 // 5
      pieces.append([Word(rest[:keep], word.colour)])
      rest = rest[keep:]
    pieces.append([Word(rest, word.colour, word.badge)])
  return pieces


def _lines(words: Sequence[Word], font: Font, width: int) -> list[list[list[Word]]]:
  """Lines of chunks, each no wider than `width` pixels."""
  lines: list[list[list[Word]]] = [[]]
  used = 0.0
  space = font.getlength(" ")
  for whole in _chunks(words):
    for chunk in _split_long(whole, font, width):
      size = sum(word_width(word, font) for word in chunk)
      if lines[-1] and used + space + size > width:
        lines.append([])
        used = 0.0
      used += size + (space if lines[-1] else 0.0)
      lines[-1].append(chunk)
  return lines


def draw_word(draw: ImageDraw.ImageDraw, x: float, y: float, word: Word, font: Font) -> None:
  """Draws a word with its top left corner at (x, y)."""
  if word.badge:
    width, height = word_width(word, font) - 0.12 * font.size, 0.86 * font.size
    top = y + 0.2 * font.size
    size = (round(width), round(height))
    box = Image.new("L", (4 * size[0], 4 * size[1]))  # drawn larger for smooth corners
    corners = (0, 0, box.width - 1, box.height - 1)
    ImageDraw.Draw(box).rounded_rectangle(corners, round(font.size), fill=255)
    smooth = box.resize(size, Image.Resampling.LANCZOS)
    draw.bitmap((round(x), round(top)), smooth, fill=word.colour)
    middle = (round(x) + size[0] / 2, round(top) + size[1] / 2)
    draw.text(middle, word.text, fill=PAPER, font=font_of(round(font.size * 0.68)), anchor="mm")
  else:
    draw.text((x, y), word.text, fill=word.colour or INK, font=font)
    if word.colour is not None:  # the built-in font has no bold: a second stroke, one pixel aside
      draw.text((x + 1, y), word.text, fill=word.colour, font=font)


def text_panel(
  question: str, paragraphs: Sequence[Paragraph], width: int, height: int
) -> Image.Image:
  """Question and text, as large as fits `height` pixels; taller where nothing fits."""
  question_words: list[Word] = []
  _append(question_words, clean(question))
  blocks = [("Question", question_words), *paragraphs]
  for size in TEXT_SIZES:
    font = font_of(size)
    laid = [(heading, _lines(words, font, width)) for heading, words in blocks]
    step = round(size * 1.5)
    headings = sum(round(size * 1.35) for heading, _ in laid if heading)
    total = headings + sum(len(lines) * step for _, lines in laid) + (len(laid) - 1) * size
    if total <= height:
      break
  panel = Image.new("RGB", (width, total), PAPER)
  draw = ImageDraw.Draw(panel)
  y = 0
  for heading, lines in laid:
    if heading:
      draw.text((0, y), heading.upper(), fill=FAINT, font=font_of(round(size * 0.72)))
      y += round(size * 1.35)
    for line in lines:
      _draw_line(draw, y, line, font)
      y += step
    y += size
  return panel


def _draw_line(draw: ImageDraw.ImageDraw, y: float, line: Sequence[list[Word]], font: Font) -> None:
  x = 0.0
  space = font.getlength(" ")
  for chunk in line:
    for word in chunk:
      if word.text != " ":
        draw_word(draw, x, y, word, font)
      x += word_width(word, font)
    x += space


def shorten(text: str, font: Font, width: float) -> str:
  """The text, cut and ended with dots where it is wider than `width` pixels."""
  if font.getlength(text) + 2 <= width:
    return text
  while text and font.getlength(text + "...") + 2 > width:
    text = text[:-1]
  return text.rstrip() + "..."
