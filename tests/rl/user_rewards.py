"""Reward functions as a user writes them, named in recipes of the tests."""

import math

from vrt_jax.rl.rewards import Sample

NOT_A_FUNCTION = 3


def brevity(sample: Sample) -> float:
  """1 for no token, 0 for 100."""
  return 1 - sample.num_tokens / 100


def letters(sample: Sample) -> float:
  """A figure that differs between almost any two texts."""
  return sum(map(ord, sample.text)) % 97 / 97


def vowels(sample: Sample) -> float:
  """1 for a text with an odd number of vowels: equal groups are common."""
  return float(sum(c in "aeiou" for c in sample.text) % 2)


def constant(sample: Sample) -> float:
  """The same for all: every group is equal."""
  return 0.25


def broken(sample: Sample) -> float:
  """Not a number."""
  return math.nan
