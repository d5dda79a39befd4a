"""Third and fourth stage of the shipped base model: language, on words that find objects.

    python -m scripts.pretrain_language --base DIR --data 'DIR/shapes_train-*.tfrecord' --out DIR
    python -m scripts.pretrain_language --base DIR --data GLOB --out DIR --framed

`--base` is what scripts.pretrain_grounding wrote, then what the third stage wrote: records of the
task "refer" come first, short and without the prompt of a trace, those of the task "framed" after
them. The text is learned as in SFT; each [SEG] learns from the first stage's prompt network which
prompt its object has, so masks need no training here; and from the start of the answer on every
token must tell a linear reader all about the object whose [SEG] comes next, so that the model looks
for an object before it writes about it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from configs import shapes_pretrain
from scripts.described import (
  NUM_FEATURES,
  PROMPTS_FILE,
  describe,
  feature_loss,
  load_prompts,
  save_prompts,
)
from scripts.pretraining import fit, stream
from vrt_jax import cli, model_directory
from vrt_jax.config import DataConfig, ImageConfig, MeshConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.records import TFRecordSource, parse_train
from vrt_jax.data.trace import training_example
from vrt_jax.data.transforms import Example, collate, make_example, object_mask
from vrt_jax.losses.token import cross_entropy
from vrt_jax.models.layers import Linear
from vrt_jax.models.sa2va import Sa2VA, gather_positions
from vrt_jax.placement import batch_sharding, put_batch
from vrt_jax.runtime import make_mesh, use_cpu_cores
from vrt_jax.types import IGNORE_INDEX, Batch

PLAIN = DataConfig(thinking=False, buckets=((160, 144),))
FRAMED = shapes_pretrain.get_config().data
MAX_SHIFT = 120
"""Plain answers move away from their question by up to so many positions: as far as the prompt of a
trace puts them."""


@dataclass(frozen=True)
class Args:
  """Trains the language model and the [SEG] prompts on referring requests."""

  base: Path
  """Model directory of the stage before."""
  data: str
  """Glob of shapes records."""
  out: Path
  """Model directory to write."""
  framed: bool = False
  """Whether the records have the marks of a trace (task "framed")."""
  steps: int = 1200
  batch_size: int = 16
  learning_rate: float = 1.5e-3
  prompt_weight: float = 1.0
  reader_weight: float = 0.2
  seed: int = 0


class Speaker(nnx.Module):
  """The language half of Sa2VA, with a linear reader of what a token knows of an object."""

  def __init__(self, model: Sa2VA, rngs: nnx.Rngs):
    self.qwen, self.text_hidden_fcs = model.qwen, model.text_hidden_fcs
    self.reader = Linear(model.config.text.hidden_size, NUM_FEATURES, rngs=rngs)


@dataclass(frozen=True)
class ToNamed(grain.transforms.RandomMap):
  """Record bytes -> a training sample, and what the object of each token's next [SEG] is like.

  The latter has features [T, F], and which of the T tokens have any: those of the answer, and the
  one before it, up to the last [SEG]. Records that do not fit the bucket (up to three in a
  hundred are too long) are left out.
  """

  tokenizer: ChatTokenizer
  image: ImageConfig
  config: DataConfig

  def random_map(
    self, element: bytes, rng: np.random.Generator
  ) -> tuple[Example, np.ndarray, np.ndarray] | None:
    record = parse_train(element)
    try:
      example = make_example(record, self.tokenizer, self.config, self.image, rng)
    except ValueError:
      return None
    _, _, tags = training_example(record.annotation, self.config.thinking)
    objects = record.annotation["original_annotation"]["objects_anns"]
    known = {}
    for tag in set(tags):
      rle = objects[tag]["segmentation"]
      known[tag] = describe(objects[tag]["caption"], object_mask(rle, tuple(rle["size"]), tag))
    features = np.stack([known[tag] for tag in tags])
    mentions = np.flatnonzero(example.input_ids == self.tokenizer.seg_id)
    tokens = np.arange(self.config.buckets[-1][0])
    upcoming = np.searchsorted(mentions, tokens)
    start = np.flatnonzero(example.labels != IGNORE_INDEX)[0]
    return (
      example,
      features[np.minimum(upcoming, len(mentions) - 1)],
      (tokens >= start - 1) & (upcoming < len(mentions)),
    )


def shift_answers(
  position_ids: Int32[jax.Array, "3 B T"], labels: Int32[jax.Array, "B T"], key: jax.Array
) -> Int32[jax.Array, "3 B T"]:
  """The positions, those from the answer on moved by a random number for each sample."""
  start = jnp.argmax(labels != IGNORE_INDEX, axis=1)
  shift = jax.random.randint(key, start.shape, 0, MAX_SHIFT + 1)
  after = jnp.arange(labels.shape[1]) >= start[:, None]
  return position_ids + jnp.where(after, shift[:, None], 0)


def train(args: Args) -> None:
  """Trains and writes the model directory."""
  use_cpu_cores(args.batch_size)
  mesh = make_mesh(MeshConfig())
  records = TFRecordSource(args.data)
  loaded = model_directory.load(str(args.base))
  model, config = loaded.model, loaded.model.config
  data = FRAMED if args.framed else PLAIN
  prompts = load_prompts(args.base / PROMPTS_FILE, config.sam2.d_model)
  teacher = nnx.split(prompts)

  def loss_fn(
    speaker: Speaker, sample: tuple[Batch, jax.Array, jax.Array], key: jax.Array
  ) -> tuple[jax.Array, dict]:
    batch, features, described = sample
    text, inputs = speaker.qwen.language_model, batch.text
    if not args.framed:
      shifted = shift_answers(inputs.position_ids, batch.targets.labels, key)
      inputs = inputs.replace(position_ids=shifted)
    hidden = text.final_norm(speaker.qwen(inputs, batch.vision))
    ce, count = cross_entropy(hidden, text.head_weight(), batch.targets.labels)
    positions, valid = batch.targets.seg_positions, batch.targets.seg_valid
    seg, objects = gather_positions(hidden, positions), gather_positions(features, positions)
    target = nnx.merge(*teacher)(objects)
    spread = jnp.mean(jnp.square(target - target.mean((0, 1))))
    miss = jnp.mean(jnp.square(speaker.text_hidden_fcs(seg) - target)) / spread
    ahead, foreseen = feature_loss(speaker.reader(hidden), features, described, described)
    told, metrics = feature_loss(speaker.reader(seg), objects, valid, valid)
    loss = ce / count + args.prompt_weight * miss + args.reader_weight * (told + ahead)
    metrics |= {f"next {name}": value for name, value in foreseen.items()}
    return loss, {"text": ce / count, "prompt": miss, **metrics}

  def batch_fn(
    samples: list[tuple[Example, np.ndarray, np.ndarray]],
  ) -> tuple[Batch, np.ndarray, np.ndarray]:
    examples, features, described = zip(*samples, strict=True)
    batch = collate(list(examples), loaded.tokenizer, config, loaded.image, data.buckets)
    return batch, np.stack(features), np.stack(described)

  to_named = ToNamed(loaded.tokenizer, loaded.image, data)
  trained = fit(
    Speaker(model, nnx.Rngs(args.seed + 2)),
    loss_fn,
    stream(records, to_named, args.batch_size, args.seed, batch_fn),
    lambda b, mesh: (put_batch(b[0], mesh), *jax.device_put(b[1:], batch_sharding(mesh))),
    mesh,
    steps=args.steps,
    learning_rate=args.learning_rate,
    seed=args.seed,
    name="language",
  )
  nnx.update(model.qwen, nnx.state(trained.qwen))
  nnx.update(model.text_hidden_fcs, nnx.state(trained.text_hidden_fcs))
  model_directory.save(args.out, model, loaded.tokenizer, loaded.image)
  save_prompts(args.out / PROMPTS_FILE, prompts)


if __name__ == "__main__":
  cli.run(
    lambda: train(cli.parse(Args, sys.argv[1:], "python -m scripts.pretrain_language", __doc__))
  )
