"""A model that is asked about one picture at a time: `vrt_jax.load(..).ask(image, question)`."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vrt_jax import model_directory
from vrt_jax.config import EvalConfig
from vrt_jax.data.image import decode_image
from vrt_jax.draw import draw_overlay
from vrt_jax.generate.predictor import Prediction, Predictor, Request, prepare, rounded_bucket
from vrt_jax.model_directory import Loaded

Picture = str | Path | bytes | Image.Image | UInt8[np.ndarray, "Y X 3"]
"""A file's path, an encoded file's bytes, a PIL image or RGB pixels."""


@dataclass(frozen=True)
class Answer(Prediction):
  """A prediction with the picture and the question it is about."""

  image: Image.Image
  question: str

  def overlay(self) -> Image.Image:
    """The trace beside the picture with its masks, and each mask by itself; 1600 pixels wide."""
    return draw_overlay(self.image, self.question, self.text, self.mentions, self.masks)


class Reasoner:
  """Answers questions about pictures; a program is compiled for each rounded size of prompt."""

  def __init__(self, loaded: Loaded, *, max_new_tokens: int = 2048, max_masks: int = 64):
    self._loaded = loaded
    self._max_new_tokens, self._max_masks = max_new_tokens, max_masks
    self._predictors: dict[tuple[tuple[int, int], bool], Predictor] = {}

  def ask(self, image: Picture, question: str, *, thinking: bool = True) -> Answer:
    """The text with a mask for each [SEG], `masks` as bool [M, Y, X] at the picture's size.

    Greedy decoding. Without `thinking` the answer comes without a reasoning trace.

    Raises:
      ValueError: the picture is corrupt or of an unusable shape, or the question holds a control
        token.
      OSError: the file cannot be read.
    """
    request = Request(encoded(image), question)
    prepared = prepare(self._loaded, request, thinking)
    key = rounded_bucket(prepared.prompt), thinking
    if key not in self._predictors:
      config = EvalConfig(
        batch_size=1,
        max_new_tokens=self._max_new_tokens,
        max_masks=self._max_masks,
        prompt_buckets=key[:1],
      )
      self._predictors[key] = Predictor(self._loaded, config, thinking=thinking)
    (found,) = self._predictors[key].answer([prepared])
    return Answer(**vars(found), image=decode_image(request.image), question=question)


def encoded(image: Picture) -> bytes:
  """The bytes of a picture file; pixels are written as PNG, so nothing is lost."""
  if isinstance(image, bytes):
    return image
  if isinstance(image, (str, Path)):
    return Path(image).read_bytes()
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise ValueError(f"pixels are {image.dtype} {image.shape}, not uint8 [height, width, 3]")
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.convert("RGB").save(buffer, "PNG")
  return buffer.getvalue()


def load(checkpoint: str | Path, *, max_new_tokens: int = 2048, max_masks: int = 64) -> Reasoner:
  """The model of a model directory, or "shapes", the shipped one.

  Raises:
    ValueError: it is no model directory.
  """
  loaded = model_directory.load(str(checkpoint))
  return Reasoner(loaded, max_new_tokens=max_new_tokens, max_masks=max_masks)
