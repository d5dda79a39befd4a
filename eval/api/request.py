"""What an endpoint is asked: the prompt, the picture as it is sent, the body of the request."""

import base64
import dataclasses
import io
import json
from typing import Any

from PIL import Image

from eval.boxes import BoxFormat
from vrt_jax.data.image import decode_image, resize_uint8, smart_resize
from vrt_jax.data.trace import THINK_TEMPLATE

BOX_TEXTS: dict[BoxFormat, tuple[str, str]] = {
  "yxyx_1000": (
    '{"box_2d": [ymin, xmin, ymax, xmax], "label": "name"}',
    "Coordinates are integers from 0 to 1000: thousandths of the picture's height and width,"
    " counted from its top left corner.",
  ),
  "xyxy_1000": (
    '{"bbox_2d": [x1, y1, x2, y2], "label": "name"}',
    "Coordinates are integers from 0 to 1000: thousandths of the picture's width and height,"
    " counted from its top left corner.",
  ),
  "xyxy_px": (
    '{"bbox_2d": [x1, y1, x2, y2], "label": "name"}',
    "Coordinates are pixels of the picture, which is $WIDTH wide and $HEIGHT high, counted from its"
    " top left corner.",
  ),
}
PROMPT = f"""$QUESTION

First think about the question step by step, then answer it. {THINK_TEMPLATE}

Both name the objects of the picture: the reasoning every object that the answer depends on, the
answer every object that answers the question and no other. Right behind each name, in the reasoning
and in the answer, write the object's bounding box as JSON, in this form:
$BOX
$COORDINATES One box holds one object. Write no list of boxes at the end."""

QWEN_FACTOR_PX = 28
QWEN_PIXELS = (4 * QWEN_FACTOR_PX**2, 16384 * QWEN_FACTOR_PX**2)
"""Qwen2.5-VL scales a picture to multiples of 28 pixels, with an area between these, and says boxes
in pixels of that (its preprocessor_config.json)."""
JPEG_QUALITY = 95
SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


@dataclasses.dataclass(frozen=True)
class SentPicture:
  """A picture as the endpoint gets it."""

  data_url: str
  size: tuple[int, int]
  """(height, width)."""


@dataclasses.dataclass(frozen=True)
class RequestSettings:
  """All that decides what is asked; answers to other settings are never mixed."""

  base_url: str
  model: str
  box_format: BoxFormat
  max_side: int
  max_tokens: int
  temperature: float
  extra: str
  """A JSON object."""

  def fingerprint(self) -> dict[str, Any]:
    """The settings with the prompt, as JSON."""
    return dataclasses.asdict(self) | {"prompt": prompt_text("$QUESTION", self.box_format)}

  def body(self, question: str, picture: SentPicture) -> dict[str, Any]:
    """The body of a POST to /chat/completions.

    Raises:
      ValueError: `extra` is no JSON object.
    """
    content = [
      {"type": "image_url", "image_url": {"url": picture.data_url}},
      {"type": "text", "text": prompt_text(question, self.box_format, picture.size)},
    ]
    body = {
      "model": self.model,
      "messages": [{"role": "user", "content": content}],
      "max_tokens": self.max_tokens,
      "temperature": self.temperature,
    }
    body |= parse_extra(self.extra)
    return {name: value for name, value in body.items() if value is not None}


def parse_extra(extra: str) -> dict[str, Any]:
  """The fields of --extra; raises ValueError where it is no JSON object."""
  try:
    fields = json.loads(extra)
  except json.JSONDecodeError as error:
    raise ValueError(f"--extra is not JSON ({error.msg})") from None
  if not isinstance(fields, dict):
    raise ValueError("--extra must be a JSON object such as '{\"seed\": 1}'")
  return fields


def prompt_text(question: str, box_format: BoxFormat, size: tuple[int, int] | None = None) -> str:
  """The user's text; `size` (height, width) of the sent picture fills the pixel format's places."""
  box, coordinates = BOX_TEXTS[box_format]
  if size is not None:
    coordinates = coordinates.replace("$WIDTH", str(size[1])).replace("$HEIGHT", str(size[0]))
  text = PROMPT.replace("$BOX", box).replace("$COORDINATES", coordinates)
  return text.replace("$QUESTION", question)


def sent_size(size: tuple[int, int], box_format: BoxFormat, max_side: int = 0) -> tuple[int, int]:
  """(height, width) that a picture of (height, width) is sent in.

  `max_side` bounds the longer side, 0 does not. For `xyxy_px` the size is what Qwen2.5-VL would
  make of it (so that its pixels are those of the picture as sent), which may be up to 28 more.

  >>> sent_size((480, 640), "xyxy_1000"), sent_size((480, 640), "xyxy_1000", 320)
  ((480, 640), (240, 320))
  >>> sent_size((480, 640), "xyxy_px")
  (476, 644)

  Raises:
    ValueError: an aspect ratio above 200 in the format `xyxy_px`.
  """
  scale = min(1.0, max_side / max(size)) if max_side else 1.0
  height, width = (max(1, round(side * scale)) for side in size)
  if box_format == "xyxy_px":
    return smart_resize(height, width, QWEN_FACTOR_PX, *QWEN_PIXELS, at_least_factor=True)
  return height, width


def sent_picture(data: bytes, box_format: BoxFormat, max_side: int = 0) -> SentPicture:
  """The picture of an encoded file as a data URL, in `sent_size`.

  The file goes as it is where nothing has to change; otherwise it is encoded as JPEG, without EXIF
  data, whose orientation masks do not follow but servers may.

  Raises:
    ValueError: the file is no picture.
  """
  image = decode_image(data)
  size = sent_size((image.height, image.width), box_format, max_side)
  kind = _kind_to_send(data)
  if not kind or size != (image.height, image.width):
    if size != (image.height, image.width):
      image = resize_uint8(image, *size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    data, kind = buffer.getvalue(), SENT_AS_THEY_ARE["JPEG"]
  return SentPicture(f"data:{kind};base64,{base64.b64encode(data).decode()}", size)


def _kind_to_send(data: bytes) -> str:
  """The MIME type of a file that can be sent as it is, "" for others."""
  with Image.open(io.BytesIO(data)) as file:
    kind = SENT_AS_THEY_ARE.get(file.format or "", "")
    plain = file.mode == "RGB" and "exif" not in file.info
  return kind if plain else ""
