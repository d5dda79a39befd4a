"""Records of the size of photographs, from random textures: for measurements, not for learning."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vrt_jax.data.records import TFRecordWriter, TrainRecord, serialize_train
from vrt_jax.ops.masks import encode_rle

WIDTH, HEIGHT = 2250, 1500
NUM_OBJECTS = 6
JPEG_QUALITY = 90
NOISE = 6.0
"""Standard deviation of the finest texture, which gives a file the bytes of a photograph."""


def texture(rng: np.random.Generator, cells: int) -> np.ndarray:
  """Smooth values 0 .. 255 [HEIGHT, WIDTH]: `cells` random heights across, joined smoothly."""
  coarse = rng.integers(0, 256, (max(2, cells * HEIGHT // WIDTH), cells), np.uint8)
  smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
  return np.asarray(smooth, np.float32)


def photo_like(rng: np.random.Generator) -> bytes:
  """A JPEG of WIDTH x HEIGHT with structure at several scales."""
  pixels = np.empty((HEIGHT, WIDTH, 3), np.float32)
  for channel in range(3):
    scales = [texture(rng, cells) for cells in (5, 40, 300)]
    pixels[..., channel] = 0.6 * scales[0] + 0.25 * scales[1] + 0.15 * scales[2]
  pixels += rng.normal(0, NOISE, pixels.shape)
  file = io.BytesIO()
  Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
  return file.getvalue()


def photo_record(seed: int) -> TrainRecord:
  """A record of the VRT-80k layout: six objects with ragged masks, five mentions or more."""
  rng = np.random.default_rng(seed)
  objects = {}
  for number in range(1, NUM_OBJECTS + 1):
    shape = texture(rng, 8) + 0.03 * texture(rng, 30)
    mask = shape > np.quantile(shape, rng.uniform(0.8, 0.97))
    objects[f"<obj{number}>"] = {"segmentation": encode_rle(mask), "caption": f"thing {number}"}
  order = [int(i) for i in rng.permutation(NUM_OBJECTS) + 1]
  seen = [f"the thing at place {i} of the picture (<ver><obj{i}></ver>)" for i in order[:4]]
  candidate = {
    "question": "Which of the things would a visitor pick up first, and for what reason?",
    "reasoning": "To answer this, one looks at each thing in turn. I can see "
    + ", which may matter for what follows, and next to it ".join(seen)
    + ". Of these only one is within reach and light enough to be carried away.",
    "answer_caption": f"The visitor picks up the thing (<vea><obj{order[4]}></vea>) first.",
    "answer_objects": [f"<obj{order[4]}>"],
  }
  annotation = {
    "generated_ver_data": {"candidates": [candidate]},
    "original_annotation": {"objects_anns": objects},
    "image_name": f"texture_{seed}.jpg",
  }
  return TrainRecord(f"texture_{seed}", photo_like(rng), annotation)


def write_photo_records(path: Path, count: int) -> None:
  """Writes a TFRecord file of `count` records."""
  with TFRecordWriter(path) as writer:
    for seed in range(count):
      writer.write(serialize_train(photo_record(seed)))
