"""The paired comparison of two models."""

import numpy as np
import pytest

from vrt_jax.metrics.comparison import paired_difference
from vrt_jax.metrics.summary import METRICS, bootstrap_ci


def run(ious: np.ndarray) -> list[dict]:
  return [
    {"reasoning_ious": [v], "answer_ious": [v], "image_id": str(i)} for i, v in enumerate(ious)
  ]


RNG = np.random.default_rng(0)
HARD = RNG.random(100) * 0.9
BETTER = HARD + 0.02 + 0.01 * RNG.random(100)


def test_a_small_constant_gain_is_found_since_what_is_hard_for_both_cancels():
  found = paired_difference([run(BETTER)], [run(HARD)])["answer_miou"]
  assert found.mean == pytest.approx((BETTER - HARD).mean())
  assert 0 < found.low < found.mean < found.high < 0.03
  assert found.p_value == pytest.approx(2 / 2000)
  low, high = bootstrap_ci(run(BETTER))["answer_miou"]
  assert high - low > 5 * (found.high - found.low)  # what an unpaired comparison would have


def test_the_other_way_round_is_the_negative():
  one = paired_difference([run(BETTER)], [run(HARD)])
  other = paired_difference([run(HARD)], [run(BETTER)])
  for name in METRICS:
    assert other[name].mean == pytest.approx(-one[name].mean)
    assert (other[name].low, other[name].high) == pytest.approx((-one[name].high, -one[name].low))
    assert other[name].p_value == one[name].p_value


def test_the_interval_is_of_95_percent_unless_another_level_is_asked_for():
  deviation = (BETTER - HARD).std() / len(HARD) ** 0.5
  for level, quantile in ((None, 1.96), (0.5, 0.674)):
    asked = {} if level is None else {"level": level}
    found = paired_difference([run(BETTER)], [run(HARD)], **asked)["answer_miou"]
    assert found.high - found.low == pytest.approx(2 * quantile * deviation, rel=0.1)


def test_without_a_difference_the_interval_holds_zero():
  same = paired_difference([run(HARD)], [run(HARD)])["answer_miou"]
  assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1.0)
  noisy = paired_difference([run(HARD)], [run(RNG.permutation(HARD))])["answer_miou"]
  assert noisy.low < 0 < noisy.high and noisy.p_value > 0.05


def test_runs_of_several_seeds_are_averaged():
  seeds = [run(HARD + shift) for shift in (0.0, 0.03, 0.06)]
  found = paired_difference(seeds, [run(HARD)])["answer_miou"]
  assert found.mean == pytest.approx(0.03)


def test_other_questions_are_refused():
  with pytest.raises(ValueError, match="not about the same questions"):
    paired_difference([run(HARD)], [run(HARD[:-1])])
  with pytest.raises(ValueError, match="needs a run"):
    paired_difference([], [run(HARD)])
