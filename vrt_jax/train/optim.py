"""AdamW and Muon, their schedule, and which parameters train."""

from collections.abc import Callable

import jax
import optax
import optax.contrib
from flax import nnx

from vrt_jax.config import OptimConfig
from vrt_jax.models.sam2.prompt_encoder import Buffer

Filter = Callable[[tuple, object], bool]

TRAINED_MODULES = {
  "language": (("text_hidden_fcs",),),
  "adapters": (("text_hidden_fcs",), ("sam2", "mask_decoder")),
}
"""Modules that train beside LoRA, by `optim.trainable` (reference: RL with "language", whose mask
decoder is frozen; SFT with "adapters")."""


MATRIX_RATE = 2.0
"""Learning rate of matrices that Muon trains, relative to that of all other parameters."""
MIN_SIDE = 16
"""Of a matrix that Muon trains."""


def trainable_filter(trainable: str) -> Filter:
  """nnx filter of the parameters that the optimiser changes.

  Raises:
    ValueError: `trainable` is none of "language", "adapters", "all".
  """
  if trainable == "all":
    return lambda path, variable: not isinstance(variable, Buffer)
  if trainable not in TRAINED_MODULES:
    raise ValueError(f'optim.trainable is "{trainable}", not "language", "adapters" or "all"')
  modules = TRAINED_MODULES[trainable]
  return lambda path, variable: (
    isinstance(variable, nnx.LoRAParam) or any(tuple(path[: len(m)]) == m for m in modules)
  )


def learning_rate_schedule(config: OptimConfig) -> optax.Schedule:
  """Step -> learning rate: linear warm-up (none for a share of 0), then cosine to 0 at the end."""
  if not config.warmup_share:
    return optax.cosine_decay_schedule(config.learning_rate, config.steps)
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
  """Clipping by global norm, then AdamW, or `muon` where the configuration says so."""
  b1, b2 = config.betas
  schedule = learning_rate_schedule(config)
  adamw = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=config.weight_decay)
  rule = adamw if config.optimizer == "adamw" else muon(schedule, adamw)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def muon(
  schedule: optax.Schedule, others: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Muon for the matrices of linear layers, `others` for all other parameters.

  Stacked layers have a matrix each; embedding tables and matrices with a side below `MIN_SIDE` are
  no matrices here. Steps are scaled to the size of AdamW's, so that they share a learning rate.
  Source: Jordan et al. 2024 (Muon); Liu et al., arXiv 2502.16982 (the scale).
  """
  matrices = optax.contrib.muon(
    lambda step: MATRIX_RATE * schedule(step),
    weight_decay=0.01,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda tree: jax.tree.map(
      lambda _: optax.contrib.MuonDimensionNumbers(-1, -2), tree
    ),
  )
  return optax.partition({"matrix": matrices, "other": others}, _matrix_labels)


def _matrix_labels(params: nnx.State) -> nnx.State:
  return jax.tree_util.tree_map_with_path(
    lambda path, v: v.replace("matrix" if _is_matrix(path, v) else "other"),
    params,
    is_leaf=lambda v: isinstance(v, nnx.Variable),
  )


def _is_matrix(path: tuple, variable: nnx.Variable) -> bool:
  axes, sides = variable.get_metadata().get("axes", ()), variable.get_value().shape[-2:]
  is_table = "vocab" in axes or "pos_embed" in jax.tree_util.keystr(path)
  return len(axes) == 2 and min(sides) >= MIN_SIDE and not is_table
