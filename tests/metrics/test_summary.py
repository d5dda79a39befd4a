"""LQ, SQ, mIoU, per class, intervals."""

import numpy as np
import pytest

from vrt_jax.metrics import bootstrap_ci, summarize
from vrt_jax.metrics.summary import METRICS, mask_precision

SAMPLES = [
  {"reasoning_ious": [0.9, 0.5, 0.0], "answer_ious": [0.6], "class_ids": ["#loc", "#visf"]},
  {"reasoning_ious": [0.7], "answer_ious": [], "class_ids": ["#loc"]},
  {"reasoning_ious": [], "answer_ious": [0.2, 1.0], "class_ids": []},
]


def test_literal_numbers_average_over_masks_and_the_threshold_is_strict():
  metrics = summarize(SAMPLES)["metrics"]
  assert metrics == pytest.approx(
    {
      "reasoning_miou": 2.1 / 4,
      "reasoning_lq": 2 / 4,
      "reasoning_sq": 0.8,
      "answer_miou": 0.6,
      "answer_lq": 2 / 3,
      "answer_sq": 0.8,
    }
  )


def test_per_class_counts_a_sample_in_each_of_its_classes():
  per_class = summarize(SAMPLES)["per_cls_metrics"]
  assert set(per_class) == {"#loc", "#visf"}
  assert per_class["#loc"]["sample_count"] == 2
  assert per_class["#loc"]["reasoning_mask_count"] == 4
  assert per_class["#loc"]["answer_mask_count"] == 1
  assert per_class["#visf"]["reasoning_lq"] == pytest.approx(1 / 3)
  assert per_class["#visf"]["reasoning_sq"] == pytest.approx(0.9)


def test_nothing_gives_zeros():
  assert summarize([]) == {"metrics": dict.fromkeys(METRICS, 0.0), "per_cls_metrics": {}}
  missed = summarize([{"reasoning_ious": [0.1], "answer_ious": [0.5], "class_ids": []}])
  assert missed["metrics"]["reasoning_sq"] == 0.0 and missed["metrics"]["answer_lq"] == 0.0


def test_intervals_are_seeded_and_cover_the_estimate():
  rng = np.random.default_rng(0)
  samples = [
    {"reasoning_ious": rng.random(3).tolist(), "answer_ious": rng.random(1).tolist()}
    for _ in range(200)
  ]
  intervals = bootstrap_ci(samples, seed=1)
  assert intervals == bootstrap_ci(samples, seed=1) != bootstrap_ci(samples, seed=2)
  metrics = summarize([s | {"class_ids": []} for s in samples])["metrics"]
  for name, (low, high) in intervals.items():
    assert low < metrics[name] < high
  low, high = intervals["answer_miou"]
  assert high - low == pytest.approx(2 * 1.96 * 12**-0.5 / 200**0.5, rel=0.15)


def test_intervals_without_spread_or_samples():
  same = [{"reasoning_ious": [1.0], "answer_ious": [], "class_ids": []}] * 5
  assert bootstrap_ci(same)["reasoning_miou"] == [1.0, 1.0]
  assert bootstrap_ci(same)["answer_sq"] == [0.0, 0.0]
  assert bootstrap_ci([])["reasoning_lq"] == [0.0, 0.0]


def test_precision_counts_predicted_masks():
  assert mask_precision(SAMPLES, [4, 1, 0], "reasoning") == 2 / 5
  assert mask_precision(SAMPLES, [0, 0, 0], "reasoning") == 0.0
