"""`report.html`: one self-contained page with the numbers and every sample, to look at and filter.

A sample shows its picture with the predicted masks beside the true ones; a mask lights up with its
mention in the text. The page is `eval/report_page` and `vrt_jax/viewer`, with the data inside.
"""

import base64
import html
import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from vrt_jax.cores import usable_cores
from vrt_jax.files import write_whole
from vrt_jax.metrics import PredictedMask
from vrt_jax.metrics.summary import HIT_IOU, METRICS, ROLES
from vrt_jax.viewer.view import json_script, page, shown_size, target_view, trace_view

REPORT_FILE = "report.html"
PAGE = Path(__file__).parent / "report_page"
PICTURE_PX = 560
"""Longer side of a picture."""
JPEG_QUALITY = 62
OTHER_OBJECT_IOU = 0.1
"""Below it a mask is on another object; up to `HIT_IOU` it is a poor mask of the right one."""
KINDS = (
  "invalid output",
  "wrong answer",
  "missed evidence",
  "poor mask",
  "extra masks",
  "right",
)

LABELS = {
  "reasoning_lq": "R-LQ",
  "reasoning_sq": "R-SQ",
  "reasoning_miou": "R-mIoU",
  "answer_lq": "A-LQ",
  "answer_sq": "A-SQ",
  "answer_miou": "A-mIoU",
}
PUBLISHED = ("reasoning_lq", "reasoning_sq", "answer_miou")


def write_report(
  results: Mapping[str, Any],
  out_dir: str | os.PathLike[str],
  images: Mapping[str, bytes] | None = None,
) -> Path:
  """Writes `report.html` into `out_dir` and returns its path.

  `results` is the content of the results file; `images` the encoded pictures by key. Texts are data
  and never markup; nothing is loaded from outside.
  """
  details = results["detailed_results"]
  pictures, names = _pictures(details, images or {})
  with ThreadPoolExecutor(usable_cores()) as pool:
    samples = list(pool.map(_sample, range(len(details)), details, names))
  body = "".join(
    [
      "<main><h1>VRT-Bench report</h1>",
      _summary_line(results),
      _cards(results),
      "<h2>By tag</h2>",
      _class_table(results),
      "<h2>By part</h2>",
      _breakdown_table(results),
      "<h2>Samples</h2>",
      _filters(results),
      '<div class="samples"><ol id="list" role="listbox" tabindex="0" aria-label="samples"></ol>'
      '<section id="detail" aria-live="polite"></section></div></main>',
      json_script("report-data", {"samples": samples, "pictures": pictures}),
    ]
  )
  text = page("VRT-Bench report", body, [PAGE / "report.css"], [PAGE / "report.js"])
  out_dir = Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  path = out_dir / REPORT_FILE
  write_whole(path, text)
  return path


def error_kinds(detail: Mapping[str, Any]) -> list[str]:
  """Which of `KINDS` an entry of `detailed_results` is; "right" where it is none of the others.

  A true mask whose partner has an IoU below 0.1 is missed ("wrong answer", "missed evidence"), from
  there to 0.5 it has a "poor mask"; a role with more masks than true ones has "extra masks".
  """
  ious, truth = detail["evaluation_details"], detail["ground_truth"]
  values = [iou for role in ROLES for iou in ious[f"{role}_ious"]]
  extra = [detail["prediction"][f"num_{role}_masks"] > truth[f"num_{role}_masks"] for role in ROLES]
  found = {
    "invalid output": bool(detail["error"]),
    "wrong answer": any(iou < OTHER_OBJECT_IOU for iou in ious["answer_ious"]),
    "missed evidence": any(iou < OTHER_OBJECT_IOU for iou in ious["reasoning_ious"]),
    "poor mask": any(OTHER_OBJECT_IOU <= iou <= HIT_IOU for iou in values),
    "extra masks": any(extra),
  }
  return [kind for kind, there in found.items() if there] or ["right"]


def _sample(number: int, detail: Mapping[str, Any], picture: str) -> dict[str, Any]:
  info, prediction = detail["sample_info"], detail["prediction"]
  ious = {role: detail["evaluation_details"][f"{role}_ious"] for role in ROLES}
  values = [iou for role in ROLES for iou in ious[role]]
  objects = [PredictedMask(**entry) for entry in prediction["objects"]]
  size = shown_size(tuple(detail["image_size"]), PICTURE_PX)
  view = trace_view(prediction["text"], objects, size)
  view["targets"] = [
    target
    for role in ROLES
    for target in target_view(detail["ground_truth"][f"{role}_masks_rle"], ious[role], role, size)
  ]
  return {
    "number": number,
    "key": info["key"],
    "question": info["question"],
    "tags": info["class_ids"],
    "kinds": error_kinds(detail),
    "invalid": detail["error"],
    "quality": sum(values) / len(values) if values else 0.0,
    "picture": picture,
    "view": view,
  }


def _pictures(
  details: list[Mapping[str, Any]], images: Mapping[str, bytes]
) -> tuple[dict[str, str], list[str]]:
  """Data URLs by name, each picture once, and the name of each sample's picture."""
  names = [d["sample_info"].get("image_id") or d["sample_info"]["key"] for d in details]
  files = {
    name: images[d["sample_info"]["key"]]
    for name, d in zip(names, details, strict=True)
    if d["sample_info"]["key"] in images
  }
  with ThreadPoolExecutor(usable_cores()) as pool:
    urls = pool.map(_data_url, files.values())
    return dict(zip(files, urls, strict=True)), names


def _data_url(image: bytes) -> str:
  """A small JPEG of an encoded picture."""
  with Image.open(io.BytesIO(image)) as picture:
    height, width = shown_size((picture.height, picture.width), PICTURE_PX)
    picture.draft("RGB", (width, height))  # a JPEG is decoded at a fraction of its size
    small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
  buffer = io.BytesIO()
  small.save(buffer, "JPEG", quality=JPEG_QUALITY)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


def _summary_line(results: Mapping[str, Any]) -> str:
  facts = [
    f"{results['total_samples']} samples",
    f"{results['total_reasoning_masks_evaluated']} reasoning masks",
    f"{results['total_answer_masks_evaluated']} answer masks",
    f"invalid outputs {_percent(results['invalid'])} %",
  ]
  for role in ROLES:
    facts.append(
      f"{role}: precision {_percent(results['precision'][role])} %, F1"
      f" {_percent(results['f1'][role])} %, {results['masks_per_sample'][role]:.1f} masks a sample"
    )
  facts += [f"{name} {results[name]}" for name in ("model_path", "config_hash") if results[name]]
  return f'<p class="facts">{html.escape(" · ".join(facts))}</p>'


def _cards(results: Mapping[str, Any]) -> str:
  """The metrics with their intervals, the published ones first."""
  cards = []
  for name in (*PUBLISHED, *(n for n in LABELS if n not in PUBLISHED)):
    low, high = results["metrics_ci"][name]
    main = " main" if name in PUBLISHED else ""
    cards.append(
      f'<div class="card{main}"><span>{LABELS[name]}</span>'
      f"<b>{_percent(results['metrics'][name])}</b>"
      f"<span>95 %: {_percent(low)} to {_percent(high)}</span></div>"
    )
  return f'<div class="cards">{"".join(cards)}</div>'


def _class_table(results: Mapping[str, Any]) -> str:
  rows = []
  for class_id, entry in sorted(results["per_cls_metrics"].items()):
    rows.append(_metric_row(class_id, entry["sample_count"], entry))
  return _metric_table("tag", rows)


def _breakdown_table(results: Mapping[str, Any]) -> str:
  names = {
    "target_size": "mask's share of the picture",
    "num_evidence": "evidence objects",
    "num_words": "words of the output",
  }
  rows = []
  for part, label in names.items():
    for name, entry in results["breakdowns"][part].items():
      count = sum(entry[f"{role}_mask_count"] for role in ROLES)
      rows.append(
        _metric_row(f"{label}: {name}", entry.get("sample_count", f"{count} masks"), entry)
      )
  return _metric_table("part", rows)


def _metric_row(name: str, count: object, entry: Mapping[str, float]) -> str:
  cells = []
  for metric in METRICS:
    width = round(60 * entry[metric])
    role = metric.partition("_")[0]
    bar = f'<span class="bar {role}" style="width:{width}px"></span>'
    cells.append(f"<td>{bar if metric in PUBLISHED else ''}{_percent(entry[metric])}</td>")
  return f"<tr><td>{html.escape(name)}</td><td>{count}</td>{''.join(cells)}</tr>"


def _metric_table(first: str, rows: list[str]) -> str:
  head = "".join(f"<th>{LABELS[name]}</th>" for name in METRICS)
  return (
    f'<div class="scroll"><table><tr><th>{first}</th><th>samples</th>{head}</tr>'
    f"{''.join(rows)}</table></div>"
  )


def _filters(results: Mapping[str, Any]) -> str:
  def select(name: str, options: list[tuple[str, str]]) -> str:
    inner = "".join(
      f'<option value="{html.escape(value)}">{html.escape(text)}</option>'
      for value, text in options
    )
    return f'<select id="{name}" aria-label="{name}">{inner}</select>'

  tags = [("", "all tags"), *((tag, tag) for tag in sorted(results["per_cls_metrics"]))]
  kinds = [("", "all kinds"), *((kind, kind) for kind in KINDS)]
  orders = [("worst", "worst first"), ("best", "best first"), ("data", "as in the data")]
  return (
    f'<div class="filters">{select("tag", tags)}{select("kind", kinds)}{select("order", orders)}'
    '<input id="words" type="search" placeholder="question or key" aria-label="search">'
    '<span id="count" class="faint" role="status"></span></div>'
  )
