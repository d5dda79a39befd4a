"""Prompts, rollouts and updates of the tiny model for the tests of groups."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tests import tiny
from vrt_jax.config import GrpoConfig, MeshConfig, ModelConfig, OptimConfig
from vrt_jax.data.transforms import Prompt, make_prompt, pad_inputs
from vrt_jax.generate.decode import GenerationInputs, TokenIds
from vrt_jax.rl.policy import GrpoBatch
from vrt_jax.runtime import make_mesh
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.state import Frozen, TrainState, create_state
from vrt_jax.types import Completions, VisualFeatures

PROMPT_SLOTS = 64
PATCHES = 64
QUESTIONS = ("Where is the [SEG] key that opens the door over there?", "What?")
MODEL = tiny.train_config().model
GRPO = GrpoConfig(group_size=3, max_new_tokens=8, max_masks=4)
OPTIM = OptimConfig(learning_rate=1e-2, steps=30, warmup_start_factor=1.0, trainable="language")


@functools.cache
def prompts(rows: int = 2) -> tuple[Prompt, ...]:
  """Prompts of different lengths and picture sizes; every other one holds a [SEG]."""
  return tuple(
    make_prompt(
      tiny.train_record(i).image,
      f"<image>\n{QUESTIONS[i % 2]}",
      tiny.tokenizer(),
      tiny.IMAGE,
      inference=True,
    )[0]
    for i in range(rows)
  )


def padded(samples: Sequence[Prompt], slots: int = PROMPT_SLOTS) -> GenerationInputs:
  """Prompts in `slots` slots."""
  bucket = (slots, PATCHES)
  text, vision, deltas = pad_inputs(list(samples), bucket, tiny.tokenizer(), tiny.IMAGE, 4)
  return GenerationInputs(text, vision, deltas, np.stack([p.grounding_image for p in samples]))


@functools.cache
def inputs(rows: int = 2) -> GenerationInputs:
  """The prompts as a batch."""
  return padded(prompts(rows))


def ids(*allowed: int) -> TokenIds:
  """The special ids; with `allowed`, all others are forbidden."""
  t = tiny.tokenizer()
  forbidden = t.never_sample_ids
  if allowed:
    forbidden = tuple(i for i in range(tiny.VOCAB_SIZE) if i not in allowed)
  return TokenIds(seg=t.seg_id, end=t.im_end_id, pad=t.endoftext_id, forbidden=forbidden)


def few_ids() -> TokenIds:
  """Five tokens may be said: samples stop at different places and hold several [SEG]."""
  return ids(ids().end, ids().seg, 40, 41, 42)


def state(
  dtype: str = "float32",
  optim: OptimConfig = OPTIM,
  mesh: Mesh | None = None,
  config: ModelConfig = MODEL,
) -> tuple[TrainState, Frozen]:
  """A new training state of the same random model, LoRA's B not zero."""
  model = tiny.random_model(dataclasses.replace(config, compute_dtype=dtype))
  mesh = mesh or make_mesh(MeshConfig())
  return create_state(model, make_optimizer(optim), trainable_filter(optim.trainable), mesh)


@functools.cache
def random_batch(rows: int = 4) -> GrpoBatch:
  """An update's input with random features, tokens and advantages; the last row has no best."""
  rng = np.random.default_rng(0)
  g, n, m = GRPO.group_size, GRPO.max_new_tokens, GRPO.max_masks
  lengths = rng.integers(3, n + 1, (rows, g)).astype(np.int32)
  tokens = rng.integers(20, 300, (rows, g, n)).astype(np.int32)
  tokens[np.arange(n) >= lengths[..., None]] = ids().pad
  slots = np.full((rows, g, m), -1, np.int32)
  slots[..., 0], slots[..., 1] = 0, 2
  tokens[..., [0, 2]] = ids().seg

  def noise(x: jax.ShapeDtypeStruct) -> np.ndarray:
    return rng.normal(size=x.shape).astype(x.dtype)

  graphdef, params = nnx.split(tiny.random_model(MODEL))

  def features(params: nnx.State, inputs: GenerationInputs):
    model = nnx.merge(graphdef, params)
    return model.qwen.visual_features(inputs.vision), model.sam2.encode_image(
      inputs.grounding_image
    )

  visual, image = jax.tree.map(noise, jax.eval_shape(features, params, inputs(rows)))
  assert isinstance(visual, VisualFeatures)
  side = MODEL.sam2.mask_size
  return GrpoBatch(
    prompts=inputs(rows).text,
    rope_deltas=inputs(rows).rope_deltas,
    visual=visual,
    image=image,
    completions=Completions(
      tokens=tokens,
      lengths=lengths,
      logps=np.where(np.arange(n) < lengths[..., None], -5.0, 0.0).astype(np.float32),
      seg_slots=slots,
    ),
    advantages=rng.normal(size=(rows, g)).astype(np.float32),
    credit=np.random.default_rng(1).normal(size=(rows, g, n)).astype(np.float32),
    best=rng.integers(0, g, rows).astype(np.int32),
    best_valid=np.arange(rows) < rows - 1,
    best_is_answer=np.tile(np.arange(m) == 1, (rows, 1)),
    answer_mask=(rng.random((rows, side, side)) < 0.3).astype(np.uint8),
  )


def on_device(batch: GrpoBatch) -> GrpoBatch:
  """Host arrays -> device arrays."""
  return jax.tree.map(jnp.asarray, batch)
