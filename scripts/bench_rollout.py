"""How fast a group of samples comes from one prompt, here and in transformers.

A random model of middle size, the same weights on both sides, float32. Ours is the rollout of
reinforcement learning: text with log-probabilities, SAM 2 and masks; transformers' `generate` with
num_return_sequences writes the text alone. No sample ends early. The sides take turns, and medians
of wall-clock time are compared; programs are compiled before.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scripts.bench_model import random_model
from scripts.bench_runs import medians
from vrt_jax.config import GrpoConfig, ImageConfig, ModelConfig, TextConfig, VisionConfig

POSITION_SIDE = 24
QUESTION = "Which of the things on the table could open the door, and where does it lie?"


@dataclass(frozen=True)
class RolloutArgs:
  """Measures a group of samples of one prompt."""

  tokenizer: Path = Path("vrt_jax/assets/shapes_base/tokenizer")
  """Folder with tokenizer.json, for both sides."""
  group_size: int = 4
  new_tokens: int = 64
  temperature: float = 1.2
  """0 is greedy: then both sides write the same."""
  picture_px: int = 640
  """Side of the picture: 640 makes 400 visual tokens; the reference's have up to 1568."""
  layers: int = 8
  hidden_size: int = 512
  vocab_size: int = 16384
  repeats: int = 5


def model_config(args: RolloutArgs) -> ModelConfig:
  """Of the model that is measured."""
  heads = args.hidden_size // 64
  return ModelConfig(
    vision=VisionConfig(num_position_embeddings=POSITION_SIDE**2, out_hidden_size=args.hidden_size),
    text=TextConfig(
      vocab_size=args.vocab_size,
      hidden_size=args.hidden_size,
      num_layers=args.layers,
      num_heads=heads,
      num_kv_heads=max(1, heads // 2),
      head_dim=64,
      intermediate_size=3 * args.hidden_size,
      mrope_section=(12, 10, 10),
    ),
  )


def measure_rollout(args: RolloutArgs) -> dict:
  """The line of results; ratios above 1 mean that we are faster."""
  from vrt_jax.data.chat import ChatTokenizer

  config = model_config(args)
  tokenizer = ChatTokenizer.from_dir(args.tokenizer)
  image = ImageConfig(min_pixels=args.picture_px**2, max_pixels=args.picture_px**2)
  group, single, theirs = sides(args, config, tokenizer, image)
  runs = {"jax": group, "single": single, "torch": theirs}
  median = medians(runs, args.repeats)
  return {
    "name": "rollout_group",
    "unit": "s a group",
    "jax": round(median["jax"], 3),
    "torch": round(median["torch"], 3),
    "ratio": round(median["torch"] / median["jax"], 2),
    "group_over_single": round(median["jax"] / median["single"], 2),
    "group_size": args.group_size,
    "new_tokens": args.new_tokens,
    "repeats": args.repeats,
  }


def sides(
  args: RolloutArgs, config: ModelConfig, tokenizer, image: ImageConfig
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray], Callable[[], np.ndarray]]:
  """(a group, a single sample, transformers' group): each gives its tokens [G, N]."""
  from converters.torch_group import torch_group
  from vrt_jax.data.trace import evaluation_user_text
  from vrt_jax.data.transforms import make_prompt
  from vrt_jax.models.sa2va import abstract_sa2va

  noise = np.random.default_rng(0).integers(0, 256, (args.picture_px, args.picture_px, 3))
  prompt, _ = make_prompt(
    _png(noise.astype(np.uint8)),
    evaluation_user_text(QUESTION, True),
    tokenizer,
    image,
    inference=True,
  )
  model = random_model(abstract_sa2va(config))
  grpo = GrpoConfig(
    group_size=args.group_size,
    max_new_tokens=args.new_tokens,
    max_masks=4,
    temperature=args.temperature,
  )
  return (
    our_rollout(model, prompt, tokenizer, image, grpo),
    our_rollout(model, prompt, tokenizer, image, replace(grpo, group_size=1)),
    torch_group(model, prompt, tokenizer, grpo),
  )


def our_rollout(
  model, prompt, tokenizer, image: ImageConfig, grpo: GrpoConfig
) -> Callable[[], np.ndarray]:
  """The rollout as training runs it."""
  import jax
  from flax import nnx

  from vrt_jax.data.transforms import pad_inputs
  from vrt_jax.generate.decode import GenerationInputs, TokenIds
  from vrt_jax.generate.predictor import rounded_bucket
  from vrt_jax.rl.rollout import make_rollout
  from vrt_jax.train.state import Frozen

  bucket = rounded_bucket(prompt)
  text, vision, deltas = pad_inputs([prompt], bucket, tokenizer, image, POSITION_SIDE)
  inputs = jax.device_put(GenerationInputs(text, vision, deltas, prompt.grounding_image[None]))
  never = -1  # no token ends a sample
  ids = TokenIds(tokenizer.seg_id, never, tokenizer.endoftext_id, tokenizer.never_sample_ids)
  graphdef, params = nnx.split(model)
  rollout = make_rollout(grpo, ids)
  key = jax.random.key(0)

  def run() -> np.ndarray:
    out = jax.block_until_ready(rollout(nnx.State({}), Frozen(graphdef, params), inputs, key))
    return np.asarray(out.completions.tokens[0])

  return run


def _png(pixels: np.ndarray) -> bytes:
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()
