"""Refuses, before the first step, set-ups that would fail later or train nothing."""

import jax

from vrt_jax.config import ImageConfig, TrainConfig
from vrt_jax.data.chat import VRT_TOKENS, ChatTokenizer
from vrt_jax.metrics.summary import METRICS
from vrt_jax.rl.scoring import Reward
from vrt_jax.runtime import batch_parts
from vrt_jax.train.state import Frozen, TrainState, parameter_counts

MIN_TEXT_TOKENS = 32
"""What a bucket needs beside the visual tokens of its patches."""


def check_numbers(config: TrainConfig) -> None:
  """Settings that fit no run, whatever the model and the devices.

  Raises:
    ValueError: one line that names the field.
  """
  positive = {
    "optim.steps": config.optim.steps,
    "optim.batch_size": config.optim.batch_size,
    "optim.accumulation_steps": config.optim.accumulation_steps,
    "log_every": config.log_every,
    "checkpoint_every": config.checkpoint_every,
    "keep_checkpoints": config.keep_checkpoints,
    "eval.batch_size": config.eval.batch_size,
  }
  for name, value in positive.items():
    if value < 1:
      raise ValueError(f"{name} is {value}, it must be at least 1")
  for name, value in {
    "optim.max_skipped_steps": config.optim.max_skipped_steps,
    "eval_every": config.eval_every,
    "early_stop": config.early_stop,
    "model.lora.rank": config.model.lora.rank,
  }.items():
    if value < 0:
      raise ValueError(f"{name} is {value}, it must not be negative")
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
  least = {"group_size": 2, "max_new_tokens": 2, "max_masks": 1, "updates_per_rollout": 1}
  for name, smallest in {**least, "max_refills": 0, "html_every": 0, "kl_weight": 0}.items():
    value = vars(grpo)[name]
    if value < smallest:
      raise ValueError(f"grpo.{name} is {value}, it must be at least {smallest}")
  if grpo.temperature <= 0 or not 0 < grpo.top_p <= 1:
    raise ValueError(
      f"grpo.temperature {grpo.temperature} must be above 0 and grpo.top_p {grpo.top_p} in (0, 1]: "
      "the samples of a group must differ"
    )
  if not 0 < grpo.epsilon < 1:
    raise ValueError(f"grpo.epsilon is {grpo.epsilon}, it must be between 0 and 1")
  own = (grpo.format_weight, grpo.answer_weight, grpo.trace_weight)
  if not any((*own, *(weight for _, weight in grpo.extra_rewards))):
    raise ValueError("all weights of rewards are 0: see grpo.format_weight, answer_weight, ..")
  if grpo.reward_clip is not None and grpo.reward_clip[0] >= grpo.reward_clip[1]:
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
  """Batches that the mesh cannot divide.

  Raises:
    ValueError: one line with both numbers.
  """
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
    for tokens, patches in buckets:
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
