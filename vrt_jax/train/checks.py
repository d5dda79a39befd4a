"""Refuses, before the first step, set-ups that would fail later or train nothing."""

import functools
import math
from typing import Any

import jax

from vrt_jax.config import ImageConfig, TrainConfig
from vrt_jax.data.chat import VRT_TOKENS, ChatTokenizer
from vrt_jax.metrics.summary import METRICS
from vrt_jax.rl.scoring import Reward
from vrt_jax.runtime import batch_parts, with_tensor
from vrt_jax.train.state import Frozen, TrainState, parameter_counts

MIN_TEXT_TOKENS = 32
"""What a bucket needs beside the visual tokens of its patches."""

MOST = 1e9
"""Of a weight or rate; neither infinite nor NaN is below it."""


RANGES: dict[str, tuple[float, float]] = {
  "seed": (0, 2**31 - 1),
  "log_every": (1, math.inf),
  "checkpoint_every": (1, math.inf),
  "keep_checkpoints": (1, math.inf),
  "eval_every": (0, math.inf),
  "early_stop": (0, math.inf),
  "profile_step": (0, math.inf),
  "model.lora.rank": (0, math.inf),
  "model.lora.alpha": (0, MOST),
  "model.lora.dropout": (0, 0.99),
  "data.shapes_train_samples": (1, math.inf),
  "data.shapes_eval_samples": (0, math.inf),
  "data.shapes_seed": (0, 2**31 - 1),
  "data.num_objects": (1, math.inf),
  "data.max_bad_share": (0, 1),
  "data.read_threads": (1, math.inf),
  "data.num_workers": (0, math.inf),
  "optim.learning_rate": (0, MOST),
  "optim.betas": (0, 0.999999),
  "optim.weight_decay": (0, MOST),
  "optim.clip_norm": (1e-12, MOST),
  "optim.warmup_share": (0, 1),
  "optim.warmup_start_factor": (0, 1),
  "optim.batch_size": (1, math.inf),
  "optim.accumulation_steps": (1, math.inf),
  "optim.steps": (1, math.inf),
  "optim.full_remat_tokens": (0, math.inf),
  "optim.max_skipped_steps": (0, math.inf),
  "sft.text_weight": (0, MOST),
  "sft.bce_weight": (0, MOST),
  "sft.dice_weight": (0, MOST),
  "sft.num_points": (1, math.inf),
  "sft.oversample_ratio": (1, MOST),
  "sft.importance_share": (0, 1),
  "grpo.group_size": (2, math.inf),
  "grpo.temperature": (1e-6, MOST),
  "grpo.top_p": (1e-6, 1),
  "grpo.max_new_tokens": (2, math.inf),
  "grpo.max_masks": (1, math.inf),
  "grpo.format_weight": (-MOST, MOST),
  "grpo.answer_weight": (-MOST, MOST),
  "grpo.trace_weight": (-MOST, MOST),
  "grpo.mention_weight": (-MOST, MOST),
  "grpo.epsilon": (1e-6, 0.999999),
  "grpo.updates_per_rollout": (1, math.inf),
  "grpo.kl_weight": (0, MOST),
  "grpo.max_refills": (0, math.inf),
  "grpo.html_every": (0, math.inf),
  "grpo.rollout_tensor": (1, math.inf),
  "eval.batch_size": (1, math.inf),
  "eval.max_new_tokens": (1, math.inf),
  "eval.max_masks": (1, math.inf),
  "eval.num_samples": (0, math.inf),
  "eval.num_pictures": (0, math.inf),
  "eval.tensor": (1, math.inf),
}
"""Field -> its smallest and largest value; both of a pair are held to it."""


def check_numbers(config: TrainConfig) -> None:
  """Settings that fit no run, whatever the model and the devices.

  Raises:
    ValueError: one line that names the field.
  """
  for name, (low, high) in RANGES.items():
    value: Any = functools.reduce(getattr, name.split("."), config)
    if not all(low <= x <= high for x in (value if isinstance(value, tuple) else (value,))):
      bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
      raise ValueError(f"{name} is {value}, it must be {bounds}")
  if config.eval_every % config.checkpoint_every:
    raise ValueError(
      f"eval_every {config.eval_every} is not a multiple of checkpoint_every "
      f"{config.checkpoint_every}"
    )
  if config.early_stop and not config.eval_every:
    raise ValueError("early_stop needs evaluations during training: set eval_every")
  if config.best_metric not in METRICS:
    raise ValueError(f'best_metric "{config.best_metric}" is none of {", ".join(METRICS)}')


def check_grpo(config: TrainConfig) -> None:
  """Settings of reinforcement learning that cannot work, and user functions that are not there.

  Raises:
    ValueError: one line that names the field.
  """
  grpo, optim = config.grpo, config.optim
  own = (grpo.format_weight, grpo.answer_weight, grpo.trace_weight)
  if not any((*own, *(weight for _, weight in grpo.extra_rewards))):
    raise ValueError("all weights of rewards are 0: see grpo.format_weight, answer_weight, ..")
  if grpo.reward_clip is not None and not grpo.reward_clip[0] < grpo.reward_clip[1]:
    raise ValueError(f"grpo.reward_clip {grpo.reward_clip} must be (low, high)")
  if not config.data.thinking:
    raise ValueError("algorithm grpo rewards reasoning traces: data.thinking must be on")
  if optim.trainable == "all":
    raise ValueError('optim.trainable is "all", which GRPO cannot train: "language" or "adapters"')
  if grpo.kl_weight and not config.model.lora.rank:
    raise ValueError("grpo.kl_weight compares with the model without adapters: set model.lora.rank")
  if grpo.drop_equal_groups and len(grpo.prompt_buckets) > 1:
    raise ValueError("grpo.drop_equal_groups joins rollouts of one size: give one prompt bucket")
  updates = grpo.updates_per_rollout
  for name, value in (("optim.steps", optim.steps), ("checkpoint_every", config.checkpoint_every)):
    if value % updates:
      raise ValueError(f"{name} {value} is not a multiple of grpo.updates_per_rollout {updates}")
  Reward(grpo)


def check_batch(config: TrainConfig, mesh: jax.sharding.Mesh, num_records: int) -> None:
  """Batches that the mesh cannot divide, and what writes text that cannot divide the mesh.

  Raises:
    ValueError: one line with both numbers.
  """
  if config.algorithm == "grpo":
    with_tensor(mesh, config.grpo.rollout_tensor)
  with_tensor(mesh, config.eval.tensor, "eval.tensor")
  size, steps, parts = config.optim.batch_size, config.optim.accumulation_steps, batch_parts(mesh)
  if size % (parts * steps):
    raise ValueError(
      f"optim.batch_size {size} does not divide into {steps} accumulation steps on {parts} parts "
      "of the mesh (data x fsdp)"
    )
  if num_records and config.eval.batch_size % parts:
    raise ValueError(
      f"eval.batch_size {config.eval.batch_size} does not divide over {parts} parts of the mesh "
      "(data x fsdp)"
    )
  if config.eval_every and not num_records:
    raise ValueError(f"eval_every is {config.eval_every}, but there are no held-out records")


def check_buckets_hold(config: TrainConfig, image: ImageConfig) -> None:
  """Buckets too small for the pictures that `image` makes.

  Raises:
    ValueError: it names the bucket.
  """
  largest = image.max_pixels // image.patch_size**2
  trained = "data.buckets", config.data.buckets
  if config.algorithm == "grpo":
    trained = "grpo.prompt_buckets", config.grpo.prompt_buckets
  for name, buckets in (trained, ("eval.prompt_buckets", config.eval.prompt_buckets)):
    if not buckets:
      raise ValueError(f"{name} is empty")
    for tokens, patches in buckets:
      if patches < 1:
        raise ValueError(f"{name}: ({tokens}, {patches}) has no patches")
      visual = patches // image.merge_size**2
      if tokens < visual + MIN_TEXT_TOKENS:
        raise ValueError(
          f"{name}: ({tokens}, {patches}) has {tokens} tokens, for {visual} visual ones and at "
          f"least {MIN_TEXT_TOKENS} of text"
        )
  name, buckets = trained
  most = max(patches for _, patches in buckets)
  if most < largest:
    raise ValueError(
      f"{name} hold {most} patches, pictures of image.max_pixels have up to {largest}"
    )


def check_tokens(tokenizer: ChatTokenizer) -> None:
  """A tokenizer that does not know Sa2VA's tokens as single ones.

  Raises:
    ValueError: it names the first token that is missing.
  """
  for token in VRT_TOKENS:
    if len(tokenizer.encode(token)) != 1:
      raise ValueError(f"the tokenizer of the base model has no token {token}")


def check_trainable(state: TrainState, frozen: Frozen) -> None:
  """Raises ValueError where no parameter trains."""
  if not sum(trained for trained, _ in parameter_counts(state, frozen).values()):
    raise ValueError("no parameter trains: see optim.trainable and model.lora.rank")
