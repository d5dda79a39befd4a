"""Tiny configurations, a tiny model, and records of the shapes world, each made once a session."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vrt_jax.config import (
  DataConfig,
  EvalConfig,
  ImageConfig,
  LoraConfig,
  ModelConfig,
  OptimConfig,
  Sam2Config,
  SftLossConfig,
  TextConfig,
  TrainConfig,
  VisionConfig,
)
from vrt_jax.data.chat import ChatTokenizer, train_bpe
from vrt_jax.data.records import EvalRecord, TFRecordWriter, TrainRecord, serialize_train
from vrt_jax.data.shapes import corpus, trace_sample
from vrt_jax.data.trace import evaluation_user_text, training_example
from vrt_jax.data.transforms import collate, make_example
from vrt_jax.model_directory import Loaded
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.types import Batch

VOCAB_SIZE = 512
BUCKETS = ((384, 64),)
IMAGE = ImageConfig(patch_size=4, min_pixels=16 * 16, max_pixels=32 * 32, grounding_size_px=64)
LORA = LoraConfig(rank=2, alpha=4.0)
MODEL = ModelConfig(
  vision=VisionConfig(
    depth=2,
    hidden_size=16,
    num_heads=2,
    intermediate_size=32,
    patch_size=4,
    num_position_embeddings=16,
    out_hidden_size=32,
    deepstack_indexes=(0,),
  ),
  text=TextConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    rope_theta=1e4,
    mrope_section=(4, 2, 2),
  ),
  sam2=Sam2Config(
    image_size_px=64,
    embed_dim=8,
    stages=(1, 1, 1, 1),
    global_attention_blocks=(2,),
    window_spec=(8, 4, 4, 2),
    d_model=32,
    decoder_num_heads=2,
    decoder_mlp_dim=32,
    iou_head_hidden_dim=16,
  ),
)
EVAL = EvalConfig(
  batch_size=2, max_new_tokens=12, max_masks=3, prompt_buckets=((160, 64),), num_samples=2
)


def odd_vocabulary(model: ModelConfig) -> ModelConfig:
  """A model with a vocabulary that no mesh divides; no token has the further id."""
  return dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=VOCAB_SIZE + 1))


def train_config(**fields: object) -> TrainConfig:
  """A recipe of the tiny model with LoRA; `fields` replace whole parts."""
  config = TrainConfig(
    model=dataclasses.replace(MODEL, lora=LORA),
    image=IMAGE,
    data=DataConfig(buckets=BUCKETS, num_objects=2, read_threads=1),
    optim=OptimConfig(learning_rate=1e-2, batch_size=2, steps=30),
    sft=SftLossConfig(num_points=64),
    eval=EVAL,
    base="",
    evaluate_base=False,
  )
  return dataclasses.replace(config, **fields)


@functools.cache
def tokenizer() -> ChatTokenizer:
  """A byte-level BPE of VOCAB_SIZE entries that knows the prompts well."""
  prompts = [evaluation_user_text("", True), evaluation_user_text("", False)]
  annotation = train_record(0).annotation
  prompts += [training_example(annotation, think_prompt=i)[0] for i in range(2)]
  return ChatTokenizer(train_bpe(corpus(40, 0) + prompts * 20, VOCAB_SIZE - 5))


@functools.cache
def train_record(index: int) -> TrainRecord:
  """Training sample `index` of the shapes world, with its own key."""
  return trace_sample(np.random.default_rng((0, index)), "train", f"train_{index}")[0]


@functools.cache
def eval_record(index: int) -> EvalRecord:
  """Held-out sample `index` of the shapes world."""
  return trace_sample(np.random.default_rng((1, index)), "eval", f"eval_{index}")[1]


def with_annotation(record: TrainRecord, key: str, **parts: object) -> TrainRecord:
  """A copy under another key whose annotation has other top-level parts."""
  return TrainRecord(key, record.image, record.annotation | parts)


def write_train(path: Path, records: Sequence[TrainRecord]) -> str:
  """Writes a TFRecord file of the VRT-80k layout and gives its path."""
  with TFRecordWriter(path) as writer:
    for record in records:
      writer.write(serialize_train(record))
  return str(path)


def random_model(config: ModelConfig = MODEL, seed: int = 0) -> Sa2VA:
  """Every parameter random, norms, biases and LoRA's B too; nothing is compiled."""
  rng = np.random.default_rng(seed)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Sa2VA(config, nnx.Rngs(0))))

  def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    names = [str(getattr(part, "key", "")) for part in path]
    noise = rng.normal(size=leaf.shape)
    if "bias" in names:
      value = 0.1 * noise
    elif any("norm" in name for name in names):
      value = 1 + 0.1 * noise
    else:
      value = noise * leaf.shape[-1] ** -0.5
    return jnp.asarray(value, leaf.dtype)

  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


@functools.cache
def loaded() -> Loaded:
  """The tiny model without LoRA, its tokenizer and its image settings."""
  return Loaded(random_model(), tokenizer(), IMAGE)


@functools.cache
def batch(size: int = 2, config: TrainConfig | None = None) -> Batch:
  """The first records of the shapes world as one training batch."""
  config = config or train_config()
  rng = np.random.default_rng(0)
  examples = [
    make_example(train_record(i), tokenizer(), config.data, config.image, rng) for i in range(size)
  ]
  return collate(examples, tokenizer(), config.model, config.image, config.data.buckets)
