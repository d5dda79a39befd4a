"""Second stage of the shipped base model: words find objects. Trains the first text layers.

    python -m scripts.pretrain_grounding --base DIR --data 'DIR/shapes_train-*.tfrecord' --out DIR

`--base` is what scripts.pretrain_perception wrote; the vision tower stays as it is. The text of a
sample is nothing but phrases, each of which names one object of the picture ("the red key, the
small object, .."), and the last token of each must tell a linear reader where that object is and
all its words. Looking for what a phrase names is what every later answer starts with; learned
from answers alone it comes late, since an answer has a few phrases among many other words.
scripts.pretrain_language goes on.
"""

import dataclasses
import itertools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from scripts.described import NUM_FEATURES, PROMPTS_FILE, describe, feature_loss
from scripts.pretraining import fit, stream
from vrt_jax import cli, model_directory
from vrt_jax.config import ImageConfig, MeshConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.records import TFRecordSource, parse_train
from vrt_jax.data.trace import IMAGE_PLACEHOLDER
from vrt_jax.data.transforms import Prompt, make_prompt, object_mask, pad_inputs
from vrt_jax.models.layers import Linear
from vrt_jax.models.qwen3_vl.model import Qwen3VL
from vrt_jax.placement import batch_sharding
from vrt_jax.runtime import make_mesh, use_cpu_cores
from vrt_jax.train.optim import trainable_filter
from vrt_jax.types import TextInputs, VisionInputs, on_host

BUCKET = (104, 144)
MAX_PHRASES = 10
Sample = tuple[Prompt, np.ndarray, np.ndarray]
PhraseBatch = tuple[TextInputs, VisionInputs, jax.Array, jax.Array]


@dataclass(frozen=True)
class Args:
  """Trains phrases to find the objects that they name."""

  base: Path
  """Model directory of the first stage."""
  data: str
  """Glob of shapes records."""
  out: Path
  """Model directory to write."""
  steps: int = 900
  batch_size: int = 32
  learning_rate: float = 1.5e-3
  layers: int = 3
  """Text layers that are trained, from the first one; the rest is left to use what they find."""
  seed: int = 0


class Finder(nnx.Module):
  """The language model and a linear reader of what a token knows of an object."""

  def __init__(self, qwen: Qwen3VL, rngs: nnx.Rngs):
    self.qwen = qwen
    self.reader = Linear(qwen.language_model.config.hidden_size, NUM_FEATURES, rngs=rngs)


def phrases(captions: list[str], rng: np.random.Generator) -> list[tuple[str, int]]:
  """Up to `MAX_PHRASES` (words that fit one caption alone, index of that caption), short preferred.

  A caption ends in its noun, for which "object" stands where the noun is not among the words.
  """
  words = [caption.split() for caption in captions]
  found = []
  for i in np.concatenate([rng.permutation(len(words)) for _ in range(2)]):
    rest = [set(w) for j, w in enumerate(words) if j != i]
    unique = [
      chosen
      for size in range(1, len(words[i]) + 1)
      for chosen in itertools.combinations(words[i], size)
      if not any(set(chosen) <= other for other in rest)
    ]
    if not unique:
      continue
    shares = np.array([1.0 / len(chosen) for chosen in unique])
    chosen = unique[rng.choice(len(unique), p=shares / shares.sum())]
    noun = [] if chosen[-1] == words[i][-1] else ["object"]
    found.append((" ".join([*chosen, *noun]), int(i)))
  return found[:MAX_PHRASES]


@dataclass(frozen=True)
class ToPhrases(grain.transforms.RandomMap):
  """Record bytes -> prompt of phrases, features [T, F] and which of the T tokens end a phrase."""

  tokenizer: ChatTokenizer
  image: ImageConfig

  def random_map(self, element: bytes, rng: np.random.Generator) -> Sample | None:
    record = parse_train(element)
    objects = record.annotation["original_annotation"]["objects_anns"]
    known = np.stack(
      [
        describe(o["caption"], object_mask(o["segmentation"], tuple(o["segmentation"]["size"]), t))
        for t, o in objects.items()
      ]
    )
    chosen = phrases([o["caption"] for o in objects.values()], rng)
    text = f"{IMAGE_PLACEHOLDER}\n" + ", ".join(f"the {phrase}" for phrase, _ in chosen) + "."
    prompt, _ = make_prompt(record.image, text, self.tokenizer, self.image, inference=False)
    ids = prompt.input_ids
    stops = np.isin(ids, [self.tokenizer.encode(stop)[0] for stop in (",", ".")])
    ends = np.flatnonzero(stops) - 1
    if len(ids) > BUCKET[0] or len(ends) != len(chosen):
      return None
    features = np.zeros((BUCKET[0], NUM_FEATURES), np.float32)
    features[ends] = known[[index for _, index in chosen]]
    return prompt, features, np.isin(np.arange(BUCKET[0]), ends)


def first_layers(qwen: Qwen3VL, count: int) -> None:
  """Cuts the text decoder down to its first `count` layers."""
  decoder = qwen.language_model
  graphdef, params = nnx.split(decoder.layers)
  decoder.layers = nnx.merge(graphdef, jax.tree.map(lambda p: p[:count], params))
  decoder.config = dataclasses.replace(decoder.config, num_layers=count)


def is_text(path: tuple, variable: object) -> bool:
  """Whether a parameter is outside the vision tower."""
  return "visual" not in path and trainable_filter("all")(path, variable)


def train(args: Args) -> None:
  """Trains and writes the model directory."""
  use_cpu_cores(args.batch_size)
  records = TFRecordSource(args.data)
  loaded = model_directory.load(str(args.base))
  model, side = loaded.model, int(loaded.model.config.vision.num_position_embeddings**0.5)
  qwen = nnx.clone(model.qwen)
  first_layers(qwen, args.layers)

  def loss_fn(finder: Finder, batch: PhraseBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    del key
    text, vision, features, ends = batch
    hidden = finder.qwen.language_model.final_norm(finder.qwen(text, vision))
    return feature_loss(finder.reader(hidden), features, ends, ends)

  def batch_fn(samples: list[Sample]) -> PhraseBatch:
    prompts, features, ends = zip(*samples, strict=True)
    text, vision, _ = pad_inputs(list(prompts), BUCKET, loaded.tokenizer, loaded.image, side)
    return text, vision, on_host(np.stack(features)), on_host(np.stack(ends))

  def put(batch: PhraseBatch, mesh: Mesh) -> PhraseBatch:
    rows, columns = batch_sharding(mesh), batch_sharding(mesh, batch_axis=1)
    text = jax.tree.map(lambda _: rows, batch[0]).replace(position_ids=columns)
    return jax.device_put(batch, (text, rows, rows, rows))

  trained = fit(
    Finder(qwen, nnx.Rngs(args.seed + 3)),
    loss_fn,
    stream(
      records, ToPhrases(loaded.tokenizer, loaded.image), args.batch_size, args.seed, batch_fn
    ),
    put,
    make_mesh(MeshConfig()),
    steps=args.steps,
    learning_rate=args.learning_rate,
    seed=args.seed,
    name="grounding",
    trainable=is_text,
  )
  whole = nnx.state(model.qwen)
  found = jax.device_get(nnx.state(trained.qwen))
  nnx.update(model.qwen, jax.tree.map(lambda old, new: old.at[: len(new)].set(new), whole, found))
  model_directory.save(args.out, model, loaded.tokenizer, loaded.image)
  shutil.copyfile(args.base / PROMPTS_FILE, args.out / PROMPTS_FILE)


if __name__ == "__main__":
  cli.run(
    lambda: train(cli.parse(Args, sys.argv[1:], "python -m scripts.pretrain_grounding", __doc__))
  )
