"""Data of reinforcement learning: prompts with the masks that their answers are compared with.

    VRT-80k record -> PromptExample (true sizes) -> PromptBatch (a bucket's sizes)

The stream is that of `vrt_jax.data.pipeline`, with the task `PROMPTS` in place of fine-tuning's.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from vrt_jax.config import ImageConfig, NearestMode, TrainConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.pipeline import Task
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.trace import (
  evaluation_user_text,
  ground_truth_tags,
  object_annotations,
  training_question,
)
from vrt_jax.data.transforms import (
  Prompt,
  choose_bucket,
  make_prompt,
  pad_inputs,
  segmentation_of,
  small_object_mask,
)
from vrt_jax.types import PromptBatch, PromptTruth, on_host


@dataclass(frozen=True)
class PromptExample(Prompt):
  """A prompt and its ground truth."""

  truth: PromptTruth


def make_prompt_example(
  record: TrainRecord,
  tokenizer: ChatTokenizer,
  image: ImageConfig,
  mask_resize: NearestMode,
  *,
  blind: bool = False,
) -> PromptExample:
  """The prompt of a record, which asks for a trace as evaluation does, on the training picture.

  Masks are those of `answer_objects` and of the objects that the reasoning mentions.

  Raises:
    ValueError: "reason: detail" where the record cannot be used.
  """
  answers, evidence = ground_truth_tags(record.annotation)
  question = training_question(record.annotation)
  prompt, size = make_prompt(
    record.image, evaluation_user_text(question), tokenizer, image, inference=False, blind=blind
  )
  objects = object_annotations(record.annotation)
  side = image.grounding_size_px // 4

  def masks(tags: list[str]) -> UInt8[np.ndarray, "N Y X"]:
    made = [
      small_object_mask(segmentation_of(objects, tag), size, tag, (side, side), mask_resize)
      for tag in tags
    ]
    return np.stack(made) if made else np.zeros((0, side, side), np.uint8)

  return PromptExample(
    input_ids=prompt.input_ids,
    patches=prompt.patches,
    grids=prompt.grids,
    grounding_image=prompt.grounding_image,
    truth=PromptTruth(record.key, question, size, masks(answers), masks(evidence)),
  )


def collate_prompts(
  examples: list[PromptExample],
  tokenizer: ChatTokenizer,
  image: ImageConfig,
  position_side: int,
  buckets: tuple[tuple[int, int], ...],
) -> PromptBatch:
  """Examples -> one batch of the smallest bucket that holds them; ValueError where none does."""
  text, vision, deltas = pad_inputs(
    examples, choose_bucket(examples, buckets), tokenizer, image, position_side
  )
  return PromptBatch(
    text=text,
    vision=vision,
    rope_deltas=on_host(deltas),
    grounding_image=on_host(np.stack([e.grounding_image for e in examples])),
    truths=tuple(e.truth for e in examples),
  )


def check_prompt_fits(example: PromptExample, buckets: tuple[tuple[int, int], ...]) -> None:
  """Raises ValueError("too long: ..") where a prompt is larger than the last bucket."""
  tokens, patches = buckets[-1]
  if len(example.input_ids) > tokens or len(example.patches) > patches:
    raise ValueError(
      f"too long: a prompt of {len(example.input_ids)} tokens and {len(example.patches)} patches, "
      f"the last bucket has {tokens} and {patches}"
    )


def prompt_example(
  record: TrainRecord, tokenizer: ChatTokenizer, config: TrainConfig, rng: np.random.Generator
) -> PromptExample:
  """`make_prompt_example` with the recipe's settings; nothing of it is random."""
  data = config.data
  example = make_prompt_example(record, tokenizer, config.image, data.mask_resize, blind=data.blind)
  check_prompt_fits(example, config.grpo.prompt_buckets)
  return example


def prompt_batch(
  examples: list[PromptExample], tokenizer: ChatTokenizer, config: TrainConfig
) -> PromptBatch:
  """`collate_prompts` with the recipe's settings."""
  side = int(config.model.vision.num_position_embeddings**0.5)
  return collate_prompts(examples, tokenizer, config.image, side, config.grpo.prompt_buckets)


PROMPTS: Task[PromptExample, PromptBatch] = Task(
  prompt_example, prompt_batch, "grpo.prompt_buckets"
)
