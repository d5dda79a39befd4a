"""The overlay picture: image with outlines, trace with coloured phrases, one tile a mask.

Style after the figures of "Visual Reasoning Tracer" (arXiv 2512.05091): an object keeps one colour
in the picture, in the text and in the tile that shows its mask on the darkened picture.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import maximum_filter, minimum_filter

from vrt_jax.ops.masks import Mask, check_mask_size, decode_rle
from vrt_jax.text_panel import (
  FAINT,
  LINE,
  PAPER,
  Colour,
  Mention,
  Word,
  badge_of,
  clean,
  colour_of,
  draw_word,
  font_of,
  object_colours,
  paragraphs,
  shorten,
  text_panel,
  word_width,
)

WIDTH = 1600
MARGIN = 32
GAP = 28
PICTURE_BOX = (840, 760)
TILE_GAP = 16
TILE_MAX_HEIGHT = 300
LABEL_SIZE = 19
EDGE_MARGIN = 6
PANORAMA = 2.1  # wider than this: the text goes below the picture
MAX_PANEL = 1.5  # and where it would be this much taller than the picture


def draw_overlay(
  image: Image.Image,
  question: str,
  text: str,
  mentions: Sequence[Mention],
  masks: Sequence[Mask] | Bool[np.ndarray, "M Y X"],
) -> Image.Image:
  """One RGB picture 1600 pixels wide of a prediction.

  `masks` hold one mask a [SEG] at the image's size (dense [Y X] or RLE); `mentions` name them by
  `index`. A mention without mask is coloured in the text only. Raises ValueError
  ("mask size: ...") where a mask is not of the image's size.
  """
  image = image.convert("RGB")
  for mask in masks:
    check_mask_size(mask, (image.height, image.width))
  dense = [decode_rle(m) if isinstance(m, Mapping) else np.asarray(m, bool) for m in masks]
  colours = object_colours(mentions)
  by_index = {m.index: m for m in mentions}
  mask_colours = [colour_of(by_index.get(i), colours) for i in range(len(dense))]
  sections = paragraphs(text, mentions, colours)
  picture = _fit(image, PICTURE_BOX)
  beside = WIDTH - 2 * MARGIN - GAP - picture.width
  panel = text_panel(question, sections, beside, picture.height)
  stacked = image.width > PANORAMA * image.height or panel.height > MAX_PANEL * picture.height
  if stacked:
    picture = _fit(image, (WIDTH - 2 * MARGIN, PICTURE_BOX[1]))
    panel = text_panel(question, sections, WIDTH - 2 * MARGIN, picture.height)
  paint_masks(picture, dense, mask_colours)
  return _compose(picture, panel, _tile_grid(image, dense, mask_colours, by_index), stacked)


def _compose(
  picture: Image.Image, panel: Image.Image, tiles: Image.Image | None, stacked: bool
) -> Image.Image:
  """The canvas: text beside the picture, or below it where `stacked`; tiles at the bottom."""
  left = MARGIN if stacked else MARGIN + picture.width + GAP
  panel_top = MARGIN + picture.height + GAP if stacked else MARGIN
  below = max(MARGIN + picture.height, panel_top + panel.height) + GAP
  height = below + (tiles.height + MARGIN if tiles is not None else MARGIN - GAP)
  canvas = Image.new("RGB", (WIDTH, height), PAPER)
  canvas.paste(picture, (MARGIN, MARGIN))
  canvas.paste(panel, (left, panel_top))
  if tiles is not None:
    canvas.paste(tiles, (MARGIN, below))
  return canvas


def _fit(image: Image.Image, box: tuple[int, int]) -> Image.Image:
  scale = min(box[0] / image.width, box[1] / image.height)
  size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
  return image.resize(size, Image.Resampling.LANCZOS)


def _scaled_mask(
  mask: Bool[np.ndarray, "Y X"], size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int]]:
  """The part of a mask that is not empty, antialiased 8-bit, and its place.

  `size` is that of the whole picture (width, height); a margin leaves room for the edge.
  """
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  scale_x, scale_y = size[0] / mask.shape[1], size[1] / mask.shape[0]
  margin_x, margin_y = EDGE_MARGIN + round(2 * scale_x), EDGE_MARGIN + round(2 * scale_y)
  left = max(0, int(columns[0] * scale_x) - margin_x)
  top = max(0, int(rows[0] * scale_y) - margin_y)
  right = min(size[0], int((columns[-1] + 1) * scale_x) + margin_x)
  bottom = min(size[1], int((rows[-1] + 1) * scale_y) + margin_y)
  source = (left / scale_x, top / scale_y, right / scale_x, bottom / scale_y)
  source = (*source[:2], min(source[2], mask.shape[1]), min(source[3], mask.shape[0]))
  picture = Image.fromarray(mask.astype(np.uint8) * 255)
  picture = picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source)
  if scale_x > 1:  # rounds the corners of enlarged pixels, then sharpens again
    picture = picture.filter(ImageFilter.GaussianBlur(0.6 * scale_x))
  return picture.point(lambda v: min(255, max(0, round((v - 128) * 3 + 128)))), (left, top)


def _edge(mask: Image.Image, width: int) -> Image.Image:
  """A soft line along the border of an 8-bit mask: about `width` pixels outside, one inside."""
  values = np.asarray(mask)
  outer, inner = maximum_filter(values, 2 * width + 1), minimum_filter(values, 3)
  return Image.fromarray(outer - inner).filter(ImageFilter.GaussianBlur(0.6))


def paint_masks(
  picture: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[Colour]
) -> None:
  """Tints and outlines every mask, in place; large ones first so that small ones stay visible."""
  areas = [int(mask.sum()) for mask in masks]
  for i in sorted(range(len(masks)), key=lambda i: -areas[i]):
    if areas[i]:
      mask, at = _scaled_mask(masks[i], picture.size)
      _paste(picture, colours[i], mask.point(lambda v: v * 70 // 255), at)
      _paste(picture, PAPER, _edge(mask, 3).point(lambda v: v * 150 // 255), at)
      _paste(picture, colours[i], _edge(mask, 2), at)


def _paste(picture: Image.Image, colour: Colour, mask: Image.Image, at: tuple[int, int]) -> None:
  picture.paste(colour, (*at, at[0] + mask.width, at[1] + mask.height), mask)


def _columns(count: int) -> int:
  """Four to six columns with the fewest empty places, eight for many tiles."""
  if count <= 4:
    return 4
  return min((6, 5, 4), key=lambda columns: -count % columns) if count <= 18 else 8


def _tile_grid(
  image: Image.Image,
  masks: Sequence[np.ndarray],
  colours: Sequence[Colour],
  by_index: Mapping[int, Mention],
) -> Image.Image | None:
  """The tiles of all masks in text order; None without masks."""
  if not masks:
    return None
  width = WIDTH - 2 * MARGIN
  columns = _columns(len(masks))
  tile_width = (width - (columns - 1) * TILE_GAP) // columns
  small = _fit(image, (tile_width, TILE_MAX_HEIGHT))
  label_height = round(LABEL_SIZE * 2.9)
  step = small.height + label_height + TILE_GAP
  rows = -(-len(masks) // columns)
  grid = Image.new("RGB", (width, rows * step - TILE_GAP), PAPER)
  draw = ImageDraw.Draw(grid)
  for i, (mask, colour) in enumerate(zip(masks, colours, strict=True)):
    x, y = (i % columns) * (tile_width + TILE_GAP), (i // columns) * step
    draw.rectangle((x, y, x + tile_width - 1, y + small.height - 1), fill=LINE)
    grid.paste(_tile(small, mask, colour), (x + (tile_width - small.width) // 2, y))
    _draw_label(draw, x, y + small.height + 8, tile_width, by_index.get(i), i, colour)
  return grid


def _tile(small: Image.Image, mask: Bool[np.ndarray, "Y X"], colour: Colour) -> Image.Image:
  """The picture darkened outside the mask, its edge in the object's colour."""
  tile = Image.eval(small, lambda v: round(v * 0.32))
  if mask.any():
    scaled, at = _scaled_mask(mask, small.size)
    part = small.crop((*at, at[0] + scaled.width, at[1] + scaled.height))
    tile.paste(part, at, scaled)
    _paste(tile, colour, _edge(scaled, 2), at)
  return tile


def _draw_label(
  draw: ImageDraw.ImageDraw,
  x: int,
  y: int,
  width: int,
  mention: Mention | None,
  index: int,
  colour: Colour,
) -> None:
  font = font_of(LABEL_SIZE)
  badge = Word(str(index + 1) if mention is None else badge_of(mention), colour, badge=True)
  draw_word(draw, x, y, badge, font)
  offset = word_width(badge, font) + 4
  phrase = "" if mention is None else " ".join(clean(mention.phrase).split())
  role = "none" if mention is None else mention.role
  label = Word(shorten(phrase or "(no phrase)", font, width - offset), colour)
  draw_word(draw, x + offset, y, label, font)
  caption = {"reasoning": "evidence", "answer": "answer"}.get(role, "no role")
  small = font_of(round(LABEL_SIZE * 0.8))
  draw.text((x, y + round(LABEL_SIZE * 1.4)), caption, fill=FAINT, font=small)
