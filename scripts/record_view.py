"""What a record holds, as text, as a picture with its masks, and as numbers over many records.

Used by `scripts.inspect_data`.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vrt_jax.data.checks import (
  Drop,
  RecordFacts,
  Verify,
  check_eval_record,
  check_train_record,
  count_drop,
)
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import EvalRecord, TrainRecord
from vrt_jax.data.sources import Source
from vrt_jax.data.trace import SEG, mentions, object_annotations, training_example
from vrt_jax.data.transforms import object_mask, segmentation_of
from vrt_jax.draw import draw_overlay

TEXT_WIDTH = 100


@dataclass(frozen=True)
class RecordView:
  """A record of either layout, ready to print and draw."""

  key: str
  size: tuple[int, int]
  """(height, width) of the picture in pixels."""
  image_bytes: int
  question: str
  target: str
  """The trace with tags and [SEG]s; in evaluation one made of the labelled captions."""
  masks: list[Bool[np.ndarray, "Y X"]]
  """One a [SEG]."""
  objects: list[tuple[str, str, float | None, str]]
  """(tag in the annotation, caption, share of the picture, role) of every annotated object; the
  share is None where the mask is not used."""
  notes: list[str]
  """Further fields, a line each."""


def train_view(record: TrainRecord, thinking: bool = True) -> RecordView:
  """The view of a training record; raises ValueError("reason: detail") where it is unusable."""
  check_train_record(record, "full", thinking)
  _, target, tags = training_example(record.annotation, thinking)
  annotations = object_annotations(record.annotation)
  picture = decode_image(record.image)
  size = picture.height, picture.width
  masks = {
    tag: object_mask(segmentation_of(annotations, tag), size, tag).astype(bool)
    for tag in dict.fromkeys(tags)
  }
  candidate = record.annotation["generated_ver_data"]["candidates"][0]
  numbers = {tag: i for i, tag in enumerate(masks, start=1)}
  return RecordView(
    key=record.key,
    size=size,
    image_bytes=len(record.image),
    question=candidate["question"],
    target=target,
    masks=[masks[tag] for tag in tags],
    objects=[
      (
        tag,
        str(info.get("caption", "")) if isinstance(info, dict) else "",
        float(masks[tag].mean()) if tag in masks else None,
        f"<obj{numbers[tag]}>, {tags.count(tag)}x" if tag in numbers else "not mentioned",
      )
      for tag, info in annotations.items()
    ],
    notes=[
      f"image_name: {record.annotation.get('image_name', '')}",
      f"answer_objects: {', '.join(map(str, candidate.get('answer_objects', [])))}",
    ],
  )


def eval_view(record: EvalRecord) -> RecordView:
  """The view of an evaluation record; raises ValueError("reason: detail") where it is unusable."""
  check_eval_record(record, "full")
  picture = decode_image(record.image)
  size = picture.height, picture.width
  masks = {
    name: object_mask(record.objects[name]["mask"], size, f"object {name}").astype(bool)
    for name in [*record.reasoning_ids, *record.answer_ids]
  }

  def phrases(names: Sequence[str], mark: str) -> str:
    return ", ".join(
      f"{record.objects[name]['caption']} (<{mark}><obj{name}> {SEG}</{mark}>)" for name in names
    )

  reasoning, answer = phrases(record.reasoning_ids, "ver"), phrases(record.answer_ids, "vea")
  roles = {
    name: " and ".join(
      role
      for role, names in (("evidence", record.reasoning_ids), ("answer", record.answer_ids))
      if name in names
    )
    for name in record.objects
  }
  return RecordView(
    key=record.key,
    size=size,
    image_bytes=len(record.image),
    question=record.question,
    target=f"<think>{reasoning}</think>\n\n<answer>{answer}</answer>",
    masks=[masks[name] for name in [*record.reasoning_ids, *record.answer_ids]],
    objects=[
      (
        f"<obj{name}>",
        info["caption"],
        float(masks[name].mean()) if name in masks else None,
        roles[name] or "not labelled",
      )
      for name, info in record.objects.items()
    ],
    notes=[
      f"class_ids: {', '.join(record.class_ids)}",
      f"human_confidence: {record.confidence}",
      f"human_reasoning: {record.reference_reasoning or '-'}",
      f"human_answer_caption: {record.reference_answer or '-'}",
    ],
  )


def text_of(view: RecordView) -> str:
  """The view in lines of text."""
  height, width = view.size
  lines = [f"key: {view.key}", f"picture: {width}x{height} pixels, {view.image_bytes:,} bytes"]
  lines += [*view.notes, "", f"question: {view.question}", ""]
  for paragraph in view.target.splitlines():
    lines += textwrap.wrap(paragraph, TEXT_WIDTH, break_long_words=False) or [""]
  lines += ["", f"{len(view.objects)} objects, {len(view.masks)} masks"]
  for tag, caption, share, role in view.objects:
    area = "      -" if share is None else f"{share:7.2%}"
    lines.append(f"  {tag:<9} {area}  {role:<20} {caption}")
  return "\n".join(lines)


def draw(view: RecordView, image: bytes) -> Image.Image:
  """The picture with outlines, the text and a tile a mask."""
  found = mentions(view.target)
  return draw_overlay(decode_image(image), view.question, view.target, found, view.masks)


@dataclass(frozen=True)
class Tally:
  """What a check of several records saw."""

  facts: list[RecordFacts]
  drops: dict[str, Drop]


def tally(
  source: Source, kind: str, verify: Verify, thinking: bool, start: int, stop: int
) -> Tally:
  """Checks the records from `start` to before `stop`."""
  facts: list[RecordFacts] = []
  drops: dict[str, Drop] = {}
  for index in range(start, stop):
    key = f"record {index}"
    try:
      record = source[index]
      key = record.key
      if kind == "train":
        facts.append(check_train_record(record, verify, thinking))
      else:
        facts.append(check_eval_record(record, verify))
    except ValueError as error:
      count_drop(drops, key, error)
  return Tally(facts, drops)


def statistics(facts: Sequence[RecordFacts]) -> list[str]:
  """A table of smallest, median, 95th percentile and largest values of usable records."""
  if not facts:
    return []
  columns: dict[str, Sequence[float]] = {
    "objects": [f.objects for f in facts],
    "mentions": [f.mentions for f in facts],
    "characters of text": [f.characters for f in facts],
    "width, pixels": [f.width for f in facts],
    "height, pixels": [f.height for f in facts],
    "megapixels": [f.width * f.height / 1e6 for f in facts],
  }
  lines = ["", f"{'':<20}{'min':>10}{'median':>10}{'95 %':>10}{'max':>10}"]
  for name, values in columns.items():
    cells = np.quantile(values, [0, 0.5, 0.95, 1])
    digits = 2 if name == "megapixels" else 0
    lines.append(f"{name:<20}" + "".join(f"{cell:>10,.{digits}f}" for cell in cells))
  return lines
