"""From samples to rewards: the weighted terms of a recipe, for all samples of a rollout.

A recipe's terms are "format", "answer" and "trace" and one a user function, named like it. All are
measured, also those of weight 0, which count nothing.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vrt_jax.config import GrpoConfig
from vrt_jax.rl.rewards import (
  Sample,
  answer_reward,
  format_reward,
  is_orderly,
  mention_rewards,
  trace_reward,
)

RewardFunction = Callable[[Sample], float]


@dataclass(frozen=True)
class Score:
  """What a sample earned."""

  terms: dict[str, float]
  """Without their weights."""
  total: float
  """The weighted sum, within the recipe's bounds."""
  mentions: Float[np.ndarray, "R"]
  """What each reasoning mask earned, see `mention_rewards`."""


class Reward:
  """The reward of a recipe.

  With `matching` "reference" the terms are the reference's to the letter. Otherwise a text that is
  not orderly (`is_orderly`) earns nothing for its form: one that never stops, repeats a tag or
  spells a [SEG]. Raises ValueError for user functions as of `resolve_function`.
  """

  def __init__(self, config: GrpoConfig):
    self._config = config
    self._weights = {
      "format": config.format_weight,
      "answer": config.answer_weight,
      "trace": config.trace_weight,
    }
    self._functions: dict[str, RewardFunction] = {}
    for path, weight in config.extra_rewards:
      name = path.rpartition(":")[2]
      if name in self._weights:
        raise ValueError(f"grpo.extra_rewards: there are two rewards of the name {name}")
      self._functions[name] = resolve_function(path)
      self._weights[name] = weight

  @property
  def names(self) -> tuple[str, ...]:
    """Of the terms, in the order of `Score.terms`."""
    return tuple(self._weights)

  def score(self, sample: Sample) -> Score:
    """The terms and their sum; ValueError where a user function gives no finite number."""
    matching = self._config.matching
    has_form = matching == "reference" or is_orderly(sample)
    terms = {
      "format": format_reward(sample.text) if has_form else 0.0,
      "answer": answer_reward(
        sample.mask_logits, sample.answer_masks, sample.answer_indices, matching
      ),
      "trace": trace_reward(
        sample.mask_logits, sample.evidence_masks, sample.reasoning_indices, matching
      ),
    }
    for name, function in self._functions.items():
      terms[name] = finite_number(function(sample), name)
    total = sum(self._weights[name] * value for name, value in terms.items())
    if self._config.reward_clip is not None:
      low, high = self._config.reward_clip
      total = min(max(total, low), high)
    mentions = mention_rewards(sample.mask_logits, sample.evidence_masks, sample.reasoning_indices)
    return Score(terms, total, mentions)

  def score_all(self, samples: Sequence[Sample], pool: ThreadPoolExecutor) -> list[Score]:
    """Scores in the order of the samples, computed by the threads of `pool`."""
    return list(pool.map(self.score, samples))


def resolve_function(path: str) -> RewardFunction:
  """The function that "package.module:function" names.

  Raises:
    ValueError: the text has another form, or there is no such module or function.
  """
  module_name, colon, name = path.partition(":")
  if not colon or not module_name or not name.isidentifier():
    raise ValueError(f'grpo.extra_rewards: "{path}" is not of the form package.module:function')
  try:
    module = importlib.import_module(module_name)
  except ImportError as error:
    raise ValueError(f'grpo.extra_rewards: "{path}": {error}') from error
  function = vars(module).get(name)
  if not callable(function):
    raise ValueError(f'grpo.extra_rewards: "{path}": {module_name} has no function {name}')
  return function


def finite_number(value: Any, name: str) -> float:
  """A user function's result; ValueError where it is no finite number."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"reward {name}: it gave {value!r}, not a finite number")
  return number
