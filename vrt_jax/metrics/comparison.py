"""Is one model better than another on the same questions? A paired bootstrap over pictures.

Both models are scored on every resampled set of pictures, so that what is hard for both cancels.
With several runs of a model (seeds) their metrics are averaged on each set: the interval is about
the pictures, given these runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vrt_jax.metrics.summary import (
  CI_LEVEL,
  CI_RESAMPLES,
  Sample,
  cluster_indices,
  resampled_metrics,
  resampling_weights,
)


@dataclass(frozen=True)
class Difference:
  """Of a metric, as fractions."""

  mean: float
  """Ours minus theirs, on all samples."""
  low: float
  """Ends of the bootstrap interval."""
  high: float
  p_value: float
  """Two-sided: twice the share of sets on the other side of 0 (or on it), at least 2 / sets."""


def paired_difference(
  ours: Sequence[Sequence[Sample]],
  theirs: Sequence[Sequence[Sample]],
  *,
  seed: int = 0,
  resamples: int = CI_RESAMPLES,
  level: float = CI_LEVEL,
) -> dict[str, Difference]:
  """Differences of every metric between the means over runs of two models.

  A run is the list of its samples (see `vrt_jax.metrics.summary`), the same questions in the same
  order in each. Deterministic in `seed`. Raises ValueError where there is no run or no sample, or
  where the true masks of two runs differ in number.
  """
  runs = [*ours, *theirs]
  if not ours or not theirs or not runs[0]:
    raise ValueError("paired_difference: needs a run of each model, with samples")
  if any(_shape(run) != _shape(runs[0]) for run in runs):
    raise ValueError("paired_difference: the runs are not about the same questions")
  weights = resampling_weights(cluster_indices(runs[0]), seed, resamples)
  weights = np.concatenate([np.ones((1, weights.shape[1])), weights])  # all samples first
  tail = 100 * (1 - level) / 2
  found = {}
  first, second = (_mean_metrics(model, weights) for model in (ours, theirs))
  for name, values in first.items():
    point, *draws = values - second[name]
    low, high = np.percentile(draws, [tail, 100 - tail])
    draws = np.asarray(draws)
    beyond = min(float(np.mean(draws <= 0)), float(np.mean(draws >= 0)))
    p_value = min(1.0, 2 * max(beyond, 1 / resamples))
    found[name] = Difference(float(point), float(low), float(high), float(p_value))
  return found


def _shape(run: Sequence[Sample]) -> list[tuple[int, int]]:
  return [(len(s["reasoning_ious"]), len(s["answer_ious"])) for s in run]


def _mean_metrics(runs: Sequence[Sequence[Sample]], weights: np.ndarray) -> dict[str, np.ndarray]:
  metrics = [resampled_metrics(run, weights) for run in runs]
  return {name: np.mean([m[name] for m in metrics], axis=0) for name in metrics[0]}
