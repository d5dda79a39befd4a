"""What `trace.js` shows of a prediction, as JSON, and the parts of a page.

text, masks -> trace_view -> {"size", "sections", "masks"} -> page -> showTrace(..) in trace.js
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vrt_jax.metrics.results import PredictedMask
from vrt_jax.ops.masks import Rle, decode_rle_nearest, encode_rle
from vrt_jax.text_panel import badge_of, colour_of, object_colours, pieces

ASSETS = Path(__file__).parent


def shown_size(image_size: tuple[int, int], longer_side: int) -> tuple[int, int]:
  """(height, width) of a picture of `image_size` whose longer side is at most `longer_side`."""
  scale = min(1.0, longer_side / max(image_size))
  return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def small_rle(mask: Any, size: tuple[int, int]) -> Rle:
  """A mask (dense or RLE) at another size, nearest neighbours."""
  if not isinstance(mask, Mapping):
    mask = encode_rle(np.asarray(mask))
  return encode_rle(decode_rle_nearest(mask, size))


def trace_view(text: str, objects: Sequence[PredictedMask], size: tuple[int, int]) -> dict:
  """A text and its masks at (height, width) `size`, as JSON.

  "sections": [{"heading", "pieces": [[words] or [words, index of the mask]]}]; "masks": [{"index",
  "role", "colour", "badge", "label", "rle"}]. `objects` name their places in the text.
  """
  colours = object_colours(objects)
  sections = []
  for heading, parts in pieces(text, objects):
    shown: list[list[Any]] = [
      [words] if mask is None else [words, mask.index]
      for words, mask in parts
      if words or mask is not None
    ]
    shown[-1][0] = shown[-1][0].rstrip()
    sections.append({"heading": heading, "pieces": shown})
  masks = [
    {
      "index": mask.index,
      "role": mask.role,
      "colour": "#{:02x}{:02x}{:02x}".format(*colour_of(mask, colours)),
      "badge": badge_of(mask),
      "label": mask.phrase or f"mask {mask.index + 1}",
      "rle": small_rle(mask.rle, size),
    }
    for mask in objects
  ]
  return {"size": list(size), "sections": sections, "masks": masks}


def target_view(
  masks: Sequence[Any], ious: Sequence[float], role: str, size: tuple[int, int]
) -> list[dict]:
  """True masks with the IoUs of their partners: [{"role", "iou", "rle"}]."""
  return [
    {"role": role, "iou": round(iou, 4), "rle": small_rle(mask, size)}
    for mask, iou in zip(masks, ious, strict=True)
  ]


def json_script(name: str, value: object) -> str:
  """A <script> that holds JSON, which no text in it can leave."""
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
  text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
  return f'<script type="application/json" id="{html.escape(name)}">{text}</script>'


def page(title: str, body: str, styles: Sequence[Path] = (), scripts: Sequence[Path] = ()) -> str:
  """A whole page with the trace's style and script, then the given files', all inline.

  Its policy lets it load and send nothing but to its own server.
  """
  style = "\n".join(p.read_text(encoding="utf-8") for p in (ASSETS / "trace.css", *styles))
  script = "\n".join(p.read_text(encoding="utf-8") for p in (ASSETS / "trace.js", *scripts))
  policy = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; connect-src 'self'"
  )
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<link rel="icon" href="data:,">'
    f"<title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n{body}\n"
    f"<script>\n{script}</script>\n</body></html>\n"
  )
