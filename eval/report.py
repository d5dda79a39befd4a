"""`report.html`: one self-contained page with the numbers and the worst samples first."""

import base64
import dataclasses
import html
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vrt_jax.draw import draw_overlay
from vrt_jax.files import write_whole
from vrt_jax.metrics import PredictedMask
from vrt_jax.metrics.summary import METRICS, ROLES

REPORT_FILE = "report.html"
THUMBNAIL_WIDTH = 1000
JPEG_QUALITY = 80

LABELS = {
  "reasoning_lq": "R-LQ",
  "reasoning_sq": "R-SQ",
  "reasoning_miou": "R-mIoU",
  "answer_lq": "A-LQ",
  "answer_sq": "A-SQ",
  "answer_miou": "A-mIoU",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #262a33; max-width: 1060px; margin: 2em auto;
  padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0 2em; }
th, td { padding: .35em .9em; border-bottom: 1px solid #e2e5ea; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { color: #7a818f; font-weight: 600; }
.ci { color: #7a818f; font-size: 85%; }
article { border-top: 1px solid #e2e5ea; padding: 1.2em 0; }
article h3 { margin: 0 0 .3em; }
article p { margin: .3em 0; overflow-wrap: anywhere; }
article img { width: 100%; height: auto; margin-top: .6em; border: 1px solid #e2e5ea; }
"""


def write_report(
  results: Mapping[str, Any],
  out_dir: str | os.PathLike[str],
  images: Mapping[str, bytes] | None = None,
  max_pictures: int = 100,
) -> Path:
  """Writes `report.html` into `out_dir` and returns its path.

  `results` is the content of the results file; `images` the encoded pictures by key. The
  `max_pictures` worst samples get a picture. Every text is escaped; nothing is loaded from outside.
  """
  details = sorted(results["detailed_results"], key=_quality)
  articles = []
  for position, detail in enumerate(details):
    image = (images or {}).get(detail["sample_info"]["key"])
    shown = image if position < max_pictures else None
    articles.append(_article(detail, shown))
  body = [
    "<h1>VRT-Bench report</h1>",
    _summary_line(results),
    _headline_table(results),
    _class_table(results),
    "<h2>Samples, worst first</h2>",
    *articles,
  ]
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>VRT-Bench report</title>'
    f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
  )
  out_dir = Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  path = out_dir / REPORT_FILE
  write_whole(path, page)
  return path


def _quality(detail: Mapping[str, Any]) -> float:
  """Mean IoU over all ground-truth masks of a sample."""
  ious = [iou for role in ROLES for iou in detail["evaluation_details"][f"{role}_ious"]]
  return sum(ious) / len(ious) if ious else 0.0


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


def _summary_line(results: Mapping[str, Any]) -> str:
  facts = [
    f"{results['total_samples']} samples",
    f"{results['total_reasoning_masks_evaluated']} reasoning masks",
    f"{results['total_answer_masks_evaluated']} answer masks",
    f"invalid outputs {_percent(results['invalid'])} %",
  ]
  facts += [f"{role} precision {_percent(results['precision'][role])} %" for role in ROLES]
  facts += [f"{name} {results[name]}" for name in ("model_path", "config_hash") if results[name]]
  return f"<p>{html.escape(', '.join(facts))}</p>"


def _headline_table(results: Mapping[str, Any]) -> str:
  rows = []
  for name, label in LABELS.items():
    low, high = results["metrics_ci"][name]
    rows.append(
      f"<tr><td>{label}</td><td><b>{_percent(results['metrics'][name])}</b></td>"
      f'<td class="ci">{_percent(low)} to {_percent(high)}</td></tr>'
    )
  head = "<tr><th>metric</th><th>%</th><th>95 % interval</th></tr>"
  return f"<table>{head}{''.join(rows)}</table>"


def _class_table(results: Mapping[str, Any]) -> str:
  head = "".join(f"<th>{LABELS[name]}</th>" for name in METRICS)
  rows = []
  for class_id, entry in sorted(results["per_cls_metrics"].items()):
    cells = "".join(f"<td>{_percent(entry[name])}</td>" for name in METRICS)
    rows.append(f"<tr><td>{html.escape(class_id)}</td><td>{entry['sample_count']}</td>{cells}</tr>")
  return f"<table><tr><th>class</th><th>samples</th>{head}</tr>{''.join(rows)}</table>"


def _article(detail: Mapping[str, Any], image: bytes | None) -> str:
  info, prediction = detail["sample_info"], detail["prediction"]
  ious = []
  for role in ROLES:
    values = detail["evaluation_details"][f"{role}_ious"]
    ious.append(f"{role} IoU: {', '.join(f'{v:.2f}' for v in values) or 'no mask'}")
  lines = [
    f"<h3>{html.escape(info['question'])}</h3>",
    f"<p class='ci'>{html.escape(info['key'])} {html.escape(' '.join(info['class_ids']))}</p>",
    f"<p>{html.escape('; '.join(ious))}</p>",
    f"<p>{html.escape(prediction['text'])}</p>",
  ]
  if detail["error"]:
    lines.append(f"<p>invalid: {html.escape(detail['error'])}</p>")
  if image is not None:
    lines.append(f'<img alt="overlay" src="{_thumbnail(detail, image)}">')
  return f"<article>{''.join(lines)}</article>"


def _thumbnail(detail: Mapping[str, Any], image: bytes) -> str:
  """The overlay as a data URL."""
  prediction = detail["prediction"]
  objects = [
    dataclasses.replace(PredictedMask(**entry), index=position)
    for position, entry in enumerate(prediction["objects"])
  ]
  question, text = detail["sample_info"]["question"], prediction["text"]
  with Image.open(io.BytesIO(image)) as picture:
    overlay = draw_overlay(picture, question, text, objects, [o.rle for o in objects])
  overlay.thumbnail((THUMBNAIL_WIDTH, 10 * THUMBNAIL_WIDTH), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  overlay.save(buffer, "JPEG", quality=JPEG_QUALITY)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
