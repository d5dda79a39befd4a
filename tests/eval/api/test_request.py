"""Prompts in three formats, and pictures as they are sent."""

import base64
import doctest
import io

import numpy as np
import pytest
from PIL import Image

from eval.api import request
from eval.api.request import RequestSettings, parse_extra, prompt_text, sent_picture, sent_size
from eval.boxes import find_boxes
from tests.pictures import encoded, picture


def settings(**changes: object) -> RequestSettings:
  fields = {
    "base_url": "http://host/v1",
    "model": "m",
    "box_format": "yxyx_1000",
    "max_side": 0,
    "max_tokens": 50,
    "temperature": 0.0,
    "extra": "{}",
  }
  return RequestSettings(**fields | changes)


def sent_image(sent: request.SentPicture) -> tuple[str, bytes, Image.Image]:
  kind, content = sent.data_url.removeprefix("data:").split(";base64,")
  data = base64.b64decode(content)
  return kind, data, Image.open(io.BytesIO(data))


def test_examples_of_the_docstrings():
  assert doctest.testmod(request).failed == 0


@pytest.mark.parametrize(
  ("box_format", "form", "coordinates"),
  [
    ("yxyx_1000", '"box_2d": [ymin, xmin, ymax, xmax]', "thousandths of the picture's height"),
    ("xyxy_1000", '"bbox_2d": [x1, y1, x2, y2]', "thousandths of the picture's width"),
    ("xyxy_px", '"bbox_2d": [x1, y1, x2, y2]', "which is 60 wide and 40 high"),
  ],
)
def test_prompts(box_format, form, coordinates):
  text = prompt_text("Which $BOX?", box_format, (40, 60))
  assert text.startswith("Which $BOX?\n") and form in text and coordinates in text
  assert "<answer>" in text and "<think>" in text
  assert "$" not in text.removeprefix("Which $BOX?")
  assert find_boxes(text, box_format, (40, 60)).boxes == []


def test_body():
  sent = request.SentPicture("data:image/png;base64,AA==", (40, 60))
  body = settings(extra='{"seed": 3, "temperature": null}').body("Which?", sent)
  assert body["model"] == "m" and body["max_tokens"] == 50 and body["seed"] == 3
  assert "temperature" not in body
  image, text = body["messages"][0]["content"]
  assert image == {"type": "image_url", "image_url": {"url": sent.data_url}}
  assert text["text"] == prompt_text("Which?", "yxyx_1000", (40, 60))


def test_the_prompt_is_part_of_the_settings():
  prompts = {settings(box_format=name).fingerprint()["prompt"] for name in request.BOX_TEXTS}
  assert len(prompts) == 3


@pytest.mark.parametrize("extra", ["{", "[1]", '"a"'])
def test_bad_extra_fields(extra):
  with pytest.raises(ValueError, match="--extra"):
    parse_extra(extra)


@pytest.mark.parametrize(("form", "kind"), [("JPEG", "image/jpeg"), ("PNG", "image/png")])
def test_a_file_goes_as_it_is(form, kind):
  data = encoded(picture(60, 40), form)
  sent = sent_picture(data, "yxyx_1000", max_side=60)
  assert sent.size == (40, 60) and sent_image(sent)[:2] == (kind, data)


def test_a_large_picture_is_scaled_down():
  sent = sent_picture(encoded(picture(120, 80)), "xyxy_1000", max_side=60)
  kind, _, image = sent_image(sent)
  assert sent.size == (40, 60) and image.size == (60, 40) and kind == "image/jpeg"
  expected = np.asarray(picture(120, 80).resize((60, 40), Image.Resampling.BICUBIC), float)
  assert np.abs(np.asarray(image, float) - expected).mean() < 4


@pytest.mark.parametrize(
  ("size", "max_side", "expected"),
  [((480, 640), 0, (476, 644)), ((480, 640), 320, (252, 308)), ((10, 20), 0, (56, 84))],
)
def test_pixel_boxes_refer_to_sides_that_the_model_keeps(size, max_side, expected):
  found = sent_size(size, "xyxy_px", max_side)
  assert found == expected and sent_size(found, "xyxy_px") == found


def test_orientation_of_a_camera_is_taken_off():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encoded(picture(60, 40), "JPEG", exif=exif)
  sent = sent_picture(data, "yxyx_1000")
  _, again, image = sent_image(sent)
  assert again != data and image.getexif().get(0x0112) is None
  assert image.size == (60, 40)  # rows as in the file, which masks follow


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_go_as_rgb(mode):
  sent = sent_picture(encoded(picture(60, 40).convert(mode)), "yxyx_1000")
  assert sent_image(sent)[2].mode == "RGB"


def test_no_picture():
  with pytest.raises(ValueError, match="corrupt image"):
    sent_picture(b"GIF89", "yxyx_1000")
