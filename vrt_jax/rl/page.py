"""A self-contained HTML page of rollouts: each group's samples side by side, with what they earned.

A group begins with the picture and its ground truth. A sample has its masks in the colours of the
words that prompted them, its text, its rewards by term and its advantage; the best one is marked.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from vrt_jax.config import GrpoConfig
from vrt_jax.data.trace import Mention, mentions
from vrt_jax.draw import paint_masks
from vrt_jax.files import write_whole
from vrt_jax.rl.groups import Groups, advantages_of
from vrt_jax.rl.rewards import Sample
from vrt_jax.rl.scoring import Score
from vrt_jax.text_panel import Colour, badge_of, colour_of, object_colour, object_colours
from vrt_jax.types import PromptTruth

NUM_GROUPS = 4
MAX_SAMPLES = 8
"""Of a group that are shown: the best and the worst ones where it has more."""
PICTURE_PX = 360
JPEG_QUALITY = 85

_TAG = re.compile(r"</?(?:think|answer|ver|vea|p|vp)>|<obj\d+>|\[SEG\]|<\|im_end\|>")

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #262a33; margin: 1.5em 2em; }
section { border-top: 2px solid #e2e5ea; padding: 1em 0 1.6em; }
h2 { margin: 0 0 .1em; font-size: 1.15em; }
.faint, figcaption { color: #7a818f; }
.truth { display: flex; gap: 14px; flex-wrap: wrap; margin: .7em 0; }
figure { margin: 0; }
figcaption { font-size: 85%; }
.samples { display: flex; gap: 14px; align-items: flex-start; overflow-x: auto; }
.sample { flex: 0 0 300px; border: 1px solid #e2e5ea; border-radius: 6px; padding: 10px; }
.best { border: 2px solid #0f8f58; background: #f4fbf7; }
.sample img { width: 100%; }
.head { display: flex; justify-content: space-between; margin-bottom: .4em; }
.text { max-height: 26em; overflow-y: auto; overflow-wrap: anywhere; white-space: pre-wrap; }
.tag { color: #b3b9c4; font-size: 80%; }
.phrase { font-weight: 600; }
.badge { color: white; border-radius: 3px; padding: 0 .35em; font-size: 80%; }
table { border-collapse: collapse; width: 100%; margin: .5em 0; }
td { padding: .1em 0; border-bottom: 1px solid #eef0f3; }
td + td { text-align: right; }
.up { color: #0f8f58; } .down { color: #d63031; }
"""


def write_page(
  path: Path, title: str, pictures: UInt8[np.ndarray, "B Y X 3"], groups: Groups, grpo: GrpoConfig
) -> None:
  """Writes the page of the first groups of a process; `pictures` are SAM 2's inputs.

  Every text is escaped, nothing is loaded from outside.
  """
  sections = [
    _group(pictures[i], groups.truths[i], groups.samples[i], groups.scores[i], grpo)
    for i in range(min(NUM_GROUPS, len(groups.truths)))
  ]
  page = (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
    f"</title><style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
    + "\n".join(sections)
    + "\n</body></html>\n"
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  write_whole(path, page)


def shown_samples(totals: Sequence[float]) -> list[int]:
  """Which samples of a group are shown, in their order: all, or as many best as worst ones."""
  by_reward = sorted(range(len(totals)), key=lambda i: (-totals[i], i))
  half = MAX_SAMPLES // 2
  chosen = by_reward if len(totals) <= MAX_SAMPLES else by_reward[:half] + by_reward[-half:]
  return sorted(chosen)


def _group(
  picture: UInt8[np.ndarray, "Y X 3"],
  truth: PromptTruth,
  samples: Sequence[Sample],
  scores: Sequence[Score],
  grpo: GrpoConfig,
) -> str:
  image = picture_of(picture, truth.image_size)
  totals = [score.total for score in scores]
  advantages = advantages_of(np.asarray([totals], np.float32), grpo)[0]
  best = int(np.argmax(totals))
  cards = [
    _sample(image, i, samples[i], scores[i], float(advantages[i]), i == best)
    for i in shown_samples(totals)
  ]
  colours = [object_colour(i) for i in range(len(truth.evidence_masks))]
  figures = [
    _figure(image, [], [], "picture"),
    _figure(image, truth.evidence_masks, colours, f"evidence ({len(colours)})"),
    _figure(
      image,
      truth.answer_masks,
      [object_colour(i) for i in range(len(truth.answer_masks))],
      f"answer ({len(truth.answer_masks)})",
    ),
  ]
  shown = "" if len(cards) == len(samples) else f", {len(cards)} of {len(samples)} samples"
  return (
    f"<section><h2>{html.escape(truth.question)}</h2>"
    f'<p class="faint">{html.escape(truth.key)}{shown}</p>'
    f'<div class="truth">{"".join(figures)}</div>'
    f'<div class="samples">{"".join(cards)}</div></section>'
  )


def _sample(
  image: Image.Image, number: int, sample: Sample, score: Score, advantage: float, is_best: bool
) -> str:
  found = mentions(sample.text)
  colours = object_colours(found)
  masks = sample.mask_logits > 0
  by_index = {mention.index: mention for mention in found}
  mask_colours = [colour_of(by_index.get(i), colours) for i in range(len(masks))]
  rows = "".join(
    f"<tr><td>{html.escape(name)}</td><td>{value:.3f}</td></tr>"
    for name, value in [*score.terms.items(), ("reward", score.total)]
  )
  sign = "up" if advantage > 0 else "down" if advantage < 0 else "faint"
  facts = f"{sample.num_tokens} tokens, {len(masks)} masks"
  return (
    f'<div class="sample{" best" if is_best else ""}"><div class="head">'
    f"<b>{number + 1}{' best' if is_best else ''}</b>"
    f'<span class="{sign}">advantage {advantage:+.2f}</span></div>'
    f"{_figure(image, masks, mask_colours, facts + (', truncated' if sample.truncated else ''))}"
    f"<table>{rows}</table>"
    f'<div class="text">{coloured_text(sample.text, found, colours)}</div></div>'
  )


def coloured_text(
  text: str, found: Sequence[Mention], colours: dict[tuple[str, int], Colour]
) -> str:
  """The text as HTML: phrases in their object's colour, tags faint."""
  parts, at = [], 0
  for mention in found:
    start, end = mention.text_span
    colour = "#{:02x}{:02x}{:02x}".format(*colour_of(mention, colours))
    parts.append(_with_faint_tags(text[at:start]))
    parts.append(
      f'<span class="phrase" style="color:{colour}">{_with_faint_tags(text[start:end])}</span>'
      f' <span class="badge" style="background:{colour}">{badge_of(mention)}</span>'
    )
    at = end
  return "".join([*parts, _with_faint_tags(text[at:])])


def _with_faint_tags(text: str) -> str:
  parts, at = [], 0
  for match in _TAG.finditer(text):
    parts.append(html.escape(text[at : match.start()]))
    parts.append(f'<span class="tag">{html.escape(match.group())}</span>')
    at = match.end()
  return "".join([*parts, html.escape(text[at:])])


def picture_of(picture: UInt8[np.ndarray, "Y X 3"], size: tuple[int, int]) -> Image.Image:
  """SAM 2's square input in the proportions of the picture, PICTURE_PX on its longer side."""
  height, width = size
  scale = PICTURE_PX / max(height, width)
  shape = (max(1, round(width * scale)), max(1, round(height * scale)))
  return Image.fromarray(picture).resize(shape, Image.Resampling.LANCZOS)


def _figure(
  image: Image.Image,
  masks: Sequence[Bool[np.ndarray, "Y X"]] | Bool[np.ndarray, "M Y X"],
  colours: Sequence[Colour],
  caption: str,
) -> str:
  painted = image.copy()
  paint_masks(painted, [np.asarray(mask, bool) for mask in masks], colours)
  buffer = io.BytesIO()
  painted.save(buffer, "JPEG", quality=JPEG_QUALITY)
  data = base64.b64encode(buffer.getvalue()).decode()
  return (
    f'<figure><img alt="{html.escape(caption)}" src="data:image/jpeg;base64,{data}">'
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
  )
