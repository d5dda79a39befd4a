"""The Python API: load, ask, look at masks, draw."""

import subprocess
import sys

import numpy as np
import pytest

import vrt_jax
from tests import tiny
from tests.pictures import encoded, picture
from vrt_jax import model_directory
from vrt_jax.data.image import decode_image
from vrt_jax.generate import reasoner as reasoners
from vrt_jax.generate.reasoner import Reasoner

PICTURE = encoded(picture(96, 64))
QUESTION = "Where is the red circle?"


@pytest.fixture(scope="module")
def reasoner():
  return Reasoner(tiny.loaded(), max_new_tokens=6)


def test_five_lines(tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(tiny.eval_record(0).image)
  answer = vrt_jax.load("shapes", max_new_tokens=144).ask(path, tiny.eval_record(0).question)
  size = (answer.image.height, answer.image.width)
  assert answer.text.startswith("<think>") and answer.masks.dtype == bool
  assert answer.masks.shape == (len(answer.mentions), *size) and answer.masks.any()
  assert [o.role for o in answer.objects()] == [m.role for m in answer.mentions]
  assert answer.overlay().size[0] == 1600


def test_every_form_of_a_picture_is_the_same(reasoner, tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(PICTURE)
  image = decode_image(PICTURE)
  forms = (PICTURE, path, str(path), image, np.asarray(image), image.convert("RGBA"))
  for form in forms:
    assert np.array_equal(decode_image(reasoners.encoded(form)), image)
  assert len({reasoner.ask(form, QUESTION).text for form in forms}) == 1


def test_one_program_a_size_of_prompt(reasoner, monkeypatch):
  made = []
  monkeypatch.setattr(
    reasoners, "Predictor", lambda *a, **k: made.append(k["thinking"]) or _Nothing()
  )
  fresh = Reasoner(reasoner._loaded)
  for question, thinking in ((QUESTION, True), (QUESTION + "?", True), (QUESTION, False)):
    fresh.ask(PICTURE, question, thinking=thinking)
  assert made == [True, False]


class _Nothing:
  def answer(self, batch):
    masks = np.zeros((0, 64, 96), bool)
    return [reasoners.Prediction("", [], masks, [], truncated=False) for _ in batch]


@pytest.mark.parametrize(
  "pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_pixels_of_another_form_are_refused(reasoner, pixels):
  with pytest.raises(ValueError, match="not uint8"):
    reasoner.ask(pixels, QUESTION)


def test_what_cannot_be_read_is_named(reasoner, tmp_path):
  with pytest.raises(ValueError, match="corrupt image"):
    reasoner.ask(b"no picture", QUESTION)
  with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
    reasoner.ask(tmp_path / "nothing.png", QUESTION)
  with pytest.raises(ValueError, match="not a model directory"):
    vrt_jax.load(tmp_path)


def test_the_package_has_nothing_else():
  with pytest.raises(AttributeError, match="nothing"):
    _ = vrt_jax.nothing
  assert vrt_jax.load is reasoners.load
  assert model_directory.resolve("shapes")


def test_importing_is_quick_and_loads_no_jax():
  code = "import sys, vrt_jax; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
