"""Teaches the small SAM 2 to segment what a prompt embedding describes, before it meets language.

    python -m scripts.pretrain_sam2 --data 'DIR/shapes_train-*.tfrecord' --out runs/shapes_sam2

The real recipe starts from SAM 2's released weights; this stands in their place. An object's prompt
is made from its centre and the words of its caption by a small network that is thrown away. What
stays is a model directory: a Sa2VA with random language weights and a trained SAM 2.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from vrt_jax import cli, model_directory
from vrt_jax.config import ModelConfig, SftLossConfig, TrainConfig
from vrt_jax.data.image import decode_image, grounding_image
from vrt_jax.data.records import TFRecordSource, parse_train
from vrt_jax.data.transforms import object_mask
from vrt_jax.losses.mask import mask_losses
from vrt_jax.models.layers import Linear
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.models.sam2.model import Sam2
from vrt_jax.ops.resize import resize_nearest_numpy
from vrt_jax.train.optim import trainable_filter
from vrt_jax.train.setup import shapes_tokenizer

WORD_BUCKETS = 64
"""Caption words are hashed into this many features."""
LOSS = SftLossConfig(dice_weight=5.0, num_points=800, oversample_ratio=1.0, importance_share=0.0)


@dataclass(frozen=True)
class Args:
  """Trains SAM 2 alone on described objects."""

  data: str
  """Glob of shapes records."""
  out: Path
  """Model directory to write."""
  steps: int = 600
  batch_size: int = 16
  objects: int = 5
  learning_rate: float = 1.5e-3
  seed: int = 0


class PromptedSam2(nnx.Module):
  """Features [B, M, 2 + WORD_BUCKETS] of described objects -> masks [B, M, Y, X]."""

  def __init__(self, sam2: Sam2, d_model: int, rngs: nnx.Rngs):
    self.sam2 = sam2
    self.fc1 = Linear(2 + WORD_BUCKETS, 4 * d_model, rngs=rngs)
    self.fc2 = Linear(4 * d_model, d_model, rngs=rngs)

  def __call__(self, images: jax.Array, features: jax.Array) -> jax.Array:
    prompts = self.fc2(jax.nn.relu(self.fc1(features)))
    return self.sam2.decode_masks(self.sam2.encode_image(images), prompts).low_res_masks


def describe(caption: str, mask: np.ndarray) -> Float[np.ndarray, "F"]:
  """Centre in [-1, 1]^2 and a bag of the caption's words."""
  rows, columns = np.nonzero(mask)
  features = np.zeros(2 + WORD_BUCKETS, np.float32)
  features[0] = 2 * columns.mean() / mask.shape[1] - 1
  features[1] = 2 * rows.mean() / mask.shape[0] - 1
  for word in caption.split():
    features[2 + sum(word.encode()) % WORD_BUCKETS] = 1.0
  return features


def batches(args: Args, image_size_px: int) -> Iterator[tuple[np.ndarray, ...]]:
  """Endless (images, features, masks), in an order that the seed decides."""
  source = TFRecordSource(args.data)
  rng = np.random.default_rng(args.seed)
  mask_size = (image_size_px // 4, image_size_px // 4)
  while True:
    images, features, masks = [], [], []
    for index in rng.choice(len(source), args.batch_size, replace=False):
      record = parse_train(source[index])
      picture = decode_image(record.image)
      annotations = record.annotation["original_annotation"]["objects_anns"]
      tags = list(annotations)
      chosen = rng.choice(len(tags), args.objects, replace=len(tags) < args.objects)
      size = (picture.height, picture.width)
      full = {i: object_mask(annotations[tags[i]]["segmentation"], size, tags[i]) for i in chosen}
      images.append(grounding_image(picture, image_size_px))
      features.append([describe(annotations[tags[i]]["caption"], full[i]) for i in chosen])
      masks.append([resize_nearest_numpy(full[i], mask_size) for i in chosen])
    yield np.stack(images), np.asarray(features), np.asarray(masks)


def train(args: Args) -> None:
  """Trains and writes the model directory."""
  config = TrainConfig(model=ModelConfig(seg_hidden="post_norm"))
  model = Sa2VA(config.model, nnx.Rngs(args.seed))
  prompted = PromptedSam2(model.sam2, config.model.sam2.d_model, nnx.Rngs(args.seed + 1))
  graphdef, params, buffers = nnx.split(prompted, trainable_filter("all"), ...)
  schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 50, args.steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, opt_state, images, features, masks, key):
    def loss(params):
      logits = nnx.merge(graphdef, params, buffers)(images, features)
      valid = jnp.ones(masks.shape[:2])
      bce, dice, count = mask_losses(key, logits, masks, valid, LOSS)
      overlap = jnp.sum((logits > 0) & (masks > 0), (2, 3))
      union = jnp.sum((logits > 0) | (masks > 0), (2, 3))
      value = (LOSS.bce_weight * bce + LOSS.dice_weight * dice) / count
      return value, jnp.mean(overlap / jnp.maximum(union, 1))

    grads, iou = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, iou

  stream = batches(args, config.model.sam2.image_size_px)
  bar = tqdm(range(args.steps), desc="sam2", unit="step")
  for i in bar:
    key = jax.random.fold_in(jax.random.key(args.seed), i)
    params, opt_state, iou = step(params, opt_state, *next(stream), key)
    if i % 20 == 0:
      bar.set_postfix(iou=f"{float(iou):.3f}")
  trained = nnx.merge(graphdef, params, buffers)
  nnx.update(model.sam2, nnx.state(trained.sam2))
  model_directory.save(args.out, model, shapes_tokenizer(config), config.image)
  print(f"{args.out}: mean IoU of the last batch {float(iou):.3f}")


if __name__ == "__main__":
  cli.run(lambda: train(cli.parse(Args, sys.argv[1:], "python -m scripts.pretrain_sam2")))
