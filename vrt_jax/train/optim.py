"""AdamW, its schedule, and which parameters train."""

from collections.abc import Callable

import optax
from flax import nnx

from vrt_jax.config import OptimConfig
from vrt_jax.models.sam2.prompt_encoder import Buffer

Filter = Callable[[tuple, object], bool]

ADAPTER_MODULES = (("text_hidden_fcs",), ("sam2", "mask_decoder"))
"""Modules that train beside LoRA (reference: vrt_sa2va_4b_qwen3_sft)."""


def trainable_filter(trainable: str) -> Filter:
  """nnx filter of the parameters that the optimiser changes.

  Raises:
    ValueError: `trainable` is neither "adapters" nor "all".
  """
  if trainable == "all":
    return lambda path, variable: not isinstance(variable, Buffer)
  if trainable == "adapters":
    return lambda path, variable: (
      isinstance(variable, nnx.LoRAParam)
      or any(tuple(path[: len(m)]) == m for m in ADAPTER_MODULES)
    )
  raise ValueError(f'optim.trainable is "{trainable}", not "adapters" or "all"')


def learning_rate_schedule(config: OptimConfig) -> optax.Schedule:
  """Step -> learning rate: linear warm-up, then cosine to 0 at the last step."""
  warmup = max(1, round(config.steps * config.warmup_share))
  return optax.join_schedules(
    [
      optax.linear_schedule(
        config.learning_rate * config.warmup_start_factor, config.learning_rate, warmup
      ),
      optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps - warmup)),
    ],
    [warmup],
  )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW."""
  b1, b2 = config.betas
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(learning_rate_schedule(config), b1=b1, b2=b2, weight_decay=config.weight_decay),
  )
