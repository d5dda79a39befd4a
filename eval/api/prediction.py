"""A response of an endpoint as a prediction: its boxes with masks at picture size."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from eval.api.responses import Response
from eval.box_masks import BoxSegmenter, filled_masks
from eval.boxes import BoxFormat, TextBox, find_boxes
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import EvalRecord
from vrt_jax.metrics import PredictedMask
from vrt_jax.ops.masks import encode_rle


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The text of one question and a mask for each of its boxes."""

  key: str
  text: str
  objects: Sequence[PredictedMask]
  boxes: Sequence[tuple[float, ...]]
  """x0, y0, x1, y1 of each object in pixels of the picture."""

  def line(self) -> dict[str, Any]:
    """A line of a predictions file as `eval.score` reads it; `box` is an addition."""
    objects = [
      {
        "index": mask.index,
        "role": mask.role,
        "phrase": mask.phrase,
        "text_span": mask.text_span,
        "rle": mask.rle,
        "score": mask.score,
        "box": box,
      }
      for mask, box in zip(self.objects, self.boxes, strict=True)
    ]
    return {"key": self.key, "text": self.text, "thinking": True, "objects": objects}


def predict(
  record: EvalRecord,
  response: Response,
  box_format: BoxFormat,
  segmenter: BoxSegmenter | None,
  max_boxes: int,
) -> Prediction:
  """Masks for the first `max_boxes` boxes of a response: SAM 2's, or filled boxes without one.

  Raises:
    ValueError: names the sample whose picture cannot be read.
  """
  try:
    picture = decode_image(record.image)
  except ValueError as error:
    raise ValueError(f"sample {record.key}: {error}") from error
  found = find_boxes(response.text, box_format, response.sent_size).boxes[:max_boxes]
  boxes = [item.box for item in found]
  scores: Sequence[float | None]
  if segmenter is None:
    masks = filled_masks(boxes, (picture.height, picture.width))
    scores = [None] * len(boxes)
  else:
    masks, scores = segmenter.masks(picture, boxes)
  objects = [
    _predicted_mask(i, *parts) for i, parts in enumerate(zip(found, masks, scores, strict=True))
  ]
  side = (picture.width, picture.height) * 2
  in_pixels = [
    tuple(round(share * s, 2) for share, s in zip(box, side, strict=True)) for box in boxes
  ]
  return Prediction(record.key, response.text, objects, in_pixels)


def _predicted_mask(index: int, item: TextBox, mask: Any, score: float | None) -> PredictedMask:
  return PredictedMask(
    rle=encode_rle(mask),
    role=item.role,
    index=index,
    phrase=item.phrase,
    text_span=item.text_span,
    score=score,
  )
