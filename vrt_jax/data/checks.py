"""Whether a record can be used: everything training or evaluation would stumble over, no model.

A record that cannot raises ValueError("reason: detail"), as the pipeline does.
"""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from vrt_jax.config import ImageConfig
from vrt_jax.data.image import decode_image, smart_resize
from vrt_jax.data.records import EvalRecord, TrainRecord
from vrt_jax.data.trace import training_example
from vrt_jax.data.transforms import object_mask, segmentation_of

Verify = Literal["header", "full"]
"""Of a picture read only the size, or decode every pixel."""


MAX_DETAIL = 200


@dataclass
class Drop:
  """Records that cannot be used for one reason, and the first of them."""

  count: int
  key: str
  detail: str


def count_drop(drops: dict[str, Drop], key: str, error: ValueError) -> None:
  """Counts an unusable record under its reason, the words before the colon of the error."""
  reason, _, detail = " ".join(str(error).split()).partition(":")
  drops.setdefault(reason, Drop(0, key, detail.strip()[:MAX_DETAIL])).count += 1


def drop_lines(drops: dict[str, Drop]) -> list[str]:
  """A line a reason, most records first: how many, and the first of them."""
  ordered = sorted(drops.items(), key=lambda item: -item[1].count)
  return [f"{d.count:>9,}  {reason}: first {d.key}: {d.detail}" for reason, d in ordered]


@dataclass(frozen=True)
class RecordFacts:
  """What a check saw of a usable record."""

  height: int
  width: int
  """Of the picture, pixels."""
  objects: int
  """Objects that the texts mention (training) or people labelled (evaluation)."""
  mentions: int
  """[SEG]s of the training target; labels of both roles in evaluation."""
  characters: int
  """Of the question and the target; of the question alone in evaluation."""


def picture_size(data: bytes, verify: Verify = "header") -> tuple[int, int]:
  """(height, width) of JPEG, PNG, .. bytes in pixels; EXIF orientation is ignored.

  Raises ValueError ("corrupt image: ..", "empty image: ..", "aspect ratio: ..").
  """
  if verify not in ("header", "full"):
    raise ValueError(f'verify must be "header" or "full", not {verify!r}')
  if verify == "full":
    picture = decode_image(data)
    height, width = picture.height, picture.width
  else:
    try:
      with Image.open(io.BytesIO(data)) as picture:
        height, width = picture.height, picture.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
      raise ValueError(f"corrupt image: {len(data)} bytes: no picture's header") from error
  config = ImageConfig()
  factor = config.patch_size * config.merge_size
  smart_resize(height, width, factor, config.min_pixels, config.max_pixels)
  return height, width


def check_train_record(
  record: TrainRecord, verify: Verify = "header", thinking: bool = True
) -> RecordFacts:
  """Raises ValueError("reason: detail") unless the record can be trained on.

  Looked at are the texts and their tags, the picture's header (or all of it), and every mask that
  the answer, and with `thinking` the reasoning mentions: it must decode and be of the picture's
  size.
  """
  user_text, target_text, tags = training_example(record.annotation, thinking)
  size = picture_size(record.image, verify)
  objects = record.annotation["original_annotation"]["objects_anns"]
  named = list(dict.fromkeys(tags))
  for tag in named:
    object_mask(segmentation_of(objects, tag), size, tag)
  return RecordFacts(*size, len(named), len(tags), len(user_text) + len(target_text))


def check_eval_record(record: EvalRecord, verify: Verify = "header") -> RecordFacts:
  """Raises ValueError("reason: detail") unless the record can be evaluated.

  Looked at are the picture as in training, and every mask that people labelled as evidence or as
  answer.
  """
  if not record.question.strip():
    raise ValueError("missing text: the question is empty")
  if not record.reasoning_ids and not record.answer_ids:
    raise ValueError("no mask mention: no object is labelled as evidence or answer")
  size = picture_size(record.image, verify)
  labels = [*record.reasoning_ids, *record.answer_ids]
  named = list(dict.fromkeys(labels))
  for name in named:
    if name not in record.objects:
      raise ValueError(f"unknown tag: object {name} is not in objects_info_json")
    object_mask(record.objects[name]["mask"], size, f"object {name}")
  return RecordFacts(*size, len(named), len(labels), len(record.question))
