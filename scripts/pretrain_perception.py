"""First stage of the shipped base model: eyes. Trains SAM 2 and the vision tower without language.

    python -m scripts.pretrain_perception --data 'DIR/shapes_train-*.tfrecord' --out DIR

The real recipe starts from released weights of both; this stands in their place. SAM 2 learns to
segment the object that a prompt describes by its place and the words of its caption; each visual
token learns to tell the same of the object that it shows. The small networks that make prompts and
read tokens are thrown away, but for the first, which scripts.pretrain_language learns from.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import shapes_pretrain
from scripts.described import (
  NUM_FEATURES,
  PROMPTS_FILE,
  PromptNet,
  describe,
  feature_loss,
  save_prompts,
  token_features,
)
from scripts.pretraining import fit, stream
from vrt_jax import cli, model_directory
from vrt_jax.config import ImageConfig, MeshConfig, NearestMode
from vrt_jax.data.image import decode_image, grounding_image, mllm_patches
from vrt_jax.data.positions import vision_layout
from vrt_jax.data.records import TFRecordSource, parse_train
from vrt_jax.data.transforms import object_mask
from vrt_jax.losses.mask import point_bce, point_dice
from vrt_jax.models.layers import Linear
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.models.stacks import stack
from vrt_jax.ops.resize import resize_nearest_numpy
from vrt_jax.placement import batch_sharding
from vrt_jax.runtime import make_mesh, use_cpu_cores
from vrt_jax.train.setup import base_model
from vrt_jax.types import VisionInputs

NUM_PATCHES = 144
NECK_SCALE = 0.2
"""Of the neck's first weights, and with the penalty below the reason why masks are learned at all:
the mask decoder adds its positions, of norm 5.7, to the neck's map, which otherwise has norm 20 at
the start and 100 soon after. Then no prompt can point to a place."""
MAP_PENALTY = 0.05
"""Of the mean square of the neck's map."""


@dataclass(frozen=True)
class Args:
  """Trains SAM 2 and the vision tower on described objects."""

  data: str
  """Glob of shapes records."""
  out: Path
  """Model directory to write."""
  steps: int = 600
  batch_size: int = 16
  objects: int = 5
  learning_rate: float = 1.5e-3
  place_noise: float = 0.2
  """Largest standard deviation of the error in a prompt's place; the picture spans -1 to 1."""
  word_dropout: float = 0.3
  """Share of the prompts that have a place only."""
  seed: int = 0


class Eyes(nnx.Module):
  """SAM 2 prompted by descriptions, and the vision tower with linear readers of its tokens."""

  def __init__(self, model: Sa2VA, rngs: nnx.Rngs):
    config = model.config
    self.sam2, self.visual = model.sam2, model.qwen.visual
    self.prompts = PromptNet(config.sam2.d_model, self.sam2.prompt_encoder.pe_layer, rngs)
    width, taps = config.vision.out_hidden_size, len(config.vision.deepstack_indexes)
    self.readers = stack(lambda rngs: Linear(width, NUM_FEATURES, rngs=rngs), 1 + taps, rngs)

  def masks(self, images: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [B, Y, X, 3] and features [B, M, F] -> mask logits [B, M, Y/4, X/4] and penalty."""
    encoded = self.sam2.encode_image(images)
    penalty = MAP_PENALTY * jnp.mean(jnp.square(encoded.stride16))
    return self.sam2.decode_masks(encoded, self.prompts(features)).low_res_masks, penalty

  def readings(self, vision: VisionInputs) -> jax.Array:
    """What the visual tokens and each DeepStack feature tell: [1 + n, B, P/4, F]."""
    tokens, deepstack = self.visual(vision, jnp.float32)
    graphdef, state = nnx.split(self.readers)
    states = jnp.concatenate([tokens[None], deepstack])
    return jax.vmap(lambda reader, x: nnx.merge(graphdef, reader)(x))(state, states)


@dataclass(frozen=True)
class ToViews(grain.transforms.RandomMap):
  """Record bytes -> arrays of one sample for `Eyes`."""

  args: Args
  image: ImageConfig
  mask_resize: NearestMode
  position_side: int

  def random_map(self, element: bytes, rng: np.random.Generator) -> dict[str, Any]:
    record, args, merge = parse_train(element), self.args, self.image.merge_size
    picture = decode_image(record.image)
    annotations = record.annotation["original_annotation"]["objects_anns"]
    size = (picture.height, picture.width)
    masks = np.stack([object_mask(a["segmentation"], size, t) for t, a in annotations.items()])
    captions = [a["caption"] for a in annotations.values()]
    features = np.stack([describe(c, m) for c, m in zip(captions, masks, strict=True)])
    patches, grid = mllm_patches(picture, self.image, inference=False)
    layout = vision_layout([grid], NUM_PATCHES, merge, self.position_side)
    tokens, covered = token_features(masks > 0, features, grid[1] // merge, grid[2] // merge)
    padding = NUM_PATCHES // merge**2 - len(tokens)
    chosen = rng.choice(len(masks), args.objects, replace=len(masks) < args.objects)
    cells, mode = (self.image.grounding_size_px // 4,) * 2, self.mask_resize
    return {
      "vision": {
        "pixel_values": np.pad(patches, ((0, NUM_PATCHES - len(patches)), (0, 0))),
        **layout._asdict(),
      },
      "token_features": np.pad(tokens, ((0, padding), (0, 0))),
      "token_covered": np.pad(covered, (0, padding)),
      "token_valid": np.arange(len(tokens) + padding) < len(tokens),
      "image": grounding_image(picture, self.image.grounding_size_px),
      "features": features[chosen],
      "masks": np.stack([resize_nearest_numpy(masks[i], cells, mode) for i in chosen]),
    }


def hint(features: jax.Array, key: jax.Array, args: Args) -> jax.Array:
  """Features [B, M, F] as language knows them: a wrong place, sometimes no words."""
  scale_key, place_key, word_key = jax.random.split(key, 3)
  row = (*features.shape[:-1], 1)
  place = features[..., :2]
  noise = args.place_noise * jax.random.uniform(scale_key, row)
  words = jax.random.bernoulli(word_key, 1.0 - args.word_dropout, row) * features[..., 2:]
  return jnp.concatenate([place + noise * jax.random.normal(place_key, place.shape), words], -1)


def mask_loss(eyes: Eyes, batch: dict, key: jax.Array, args: Args) -> tuple[jax.Array, dict]:
  """Mask losses with the reference's weight of BCE, and dice 5, over all cells."""
  logits, penalty = eyes.masks(batch["image"], hint(batch["features"], key, args))
  truth = batch["masks"].astype(jnp.float32)
  rows = truth.shape[0] * truth.shape[1]
  flat, flat_truth, ones = logits.reshape(rows, -1), truth.reshape(rows, -1), jnp.ones(rows)
  bce, dice = (f(flat, flat_truth, ones) / rows for f in (point_bce, point_dice))
  overlap = jnp.sum((logits > 0) & (truth > 0), (2, 3))
  union = jnp.sum((logits > 0) | (truth > 0), (2, 3))
  iou = jnp.mean(overlap / jnp.maximum(union, 1))
  return 2.0 * bce + 5.0 * dice + penalty, {"iou": iou, "dice": dice}


def reading_loss(eyes: Eyes, batch: dict) -> tuple[jax.Array, dict]:
  """What the visual tokens and the DeepStack features tell wrong; metrics of the former."""
  losses, metrics = zip(
    *(
      feature_loss(r, batch["token_features"], batch["token_covered"], batch["token_valid"])
      for r in eyes.readings(VisionInputs(**batch["vision"]))
    ),
    strict=True,
  )
  return sum(losses) / len(losses), metrics[0]


def train(args: Args) -> None:
  """Trains and writes the model directory, with the prompt network's weights beside it."""
  use_cpu_cores(args.batch_size)
  records = TFRecordSource(args.data)
  config = dataclasses.replace(shapes_pretrain.get_config(), base="", seed=args.seed)
  loaded = base_model(config)
  model = loaded.model
  for conv in model.sam2.image_encoder.neck.convs:
    conv.weight[...] = NECK_SCALE * conv.weight[...]

  def loss_fn(eyes: Eyes, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
    masks, metrics = mask_loss(eyes, batch, key, args)
    readings, told = reading_loss(eyes, batch)
    return masks + readings, metrics | told

  side = int(model.config.vision.num_position_embeddings**0.5)
  to_views = ToViews(args, loaded.image, config.data.mask_resize, side)
  trained = fit(
    Eyes(model, nnx.Rngs(args.seed + 1)),
    loss_fn,
    stream(records, to_views, args.batch_size, args.seed),
    lambda batch, mesh: jax.device_put(batch, batch_sharding(mesh)),
    make_mesh(MeshConfig()),
    steps=args.steps,
    learning_rate=args.learning_rate,
    seed=args.seed,
    name="perception",
  )
  nnx.update(model.sam2, nnx.state(trained.sam2))
  nnx.update(model.qwen.visual, nnx.state(trained.visual))
  model_directory.save(args.out, model, loaded.tokenizer, loaded.image)
  save_prompts(args.out / PROMPTS_FILE, trained.prompts)


if __name__ == "__main__":
  cli.run(
    lambda: train(cli.parse(Args, sys.argv[1:], "python -m scripts.pretrain_perception", __doc__))
  )
