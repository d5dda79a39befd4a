"""LQ, SQ, mIoU, per class, intervals."""

import numpy as np
import pytest

from vrt_jax.metrics import bootstrap_ci, summarize
from vrt_jax.metrics.summary import METRICS, cluster_indices, detection, resampled_metrics

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


def test_all_samples_once_have_the_metrics_themselves():
  whole = resampled_metrics(SAMPLES, np.ones((1, len(SAMPLES))))
  assert {name: values[0] for name, values in whole.items()} == pytest.approx(
    summarize(SAMPLES)["metrics"]
  )


def test_intervals_without_spread_or_samples():
  same = [{"reasoning_ious": [1.0], "answer_ious": [], "class_ids": []}] * 5
  assert bootstrap_ci(same)["reasoning_miou"] == [1.0, 1.0]
  assert bootstrap_ci(same)["answer_sq"] == [0.0, 0.0]
  assert bootstrap_ci([])["reasoning_lq"] == [0.0, 0.0]


def test_questions_about_one_picture_are_drawn_together():
  """Four equal questions a picture: the interval is that of the pictures, twice as wide."""
  rng = np.random.default_rng(3)
  ious = rng.random(60)
  apart = [{"reasoning_ious": [], "answer_ious": [iou]} for iou in np.repeat(ious, 4)]
  together = [s | {"image_id": str(i // 4)} for i, s in enumerate(apart)]
  pictures = [{"reasoning_ious": [], "answer_ious": [iou]} for iou in ious]
  width = {
    name: np.ptp(bootstrap_ci(samples)["answer_miou"])
    for name, samples in (("apart", apart), ("together", together), ("pictures", pictures))
  }
  assert width["together"] == pytest.approx(width["pictures"], rel=1e-9)
  assert width["together"] == pytest.approx(2 * width["apart"], rel=0.1)


def test_samples_without_an_image_are_pictures_of_their_own():
  samples = [{"image_id": "a"}, {}, {"image_id": ""}, {"image_id": "a"}, {"image_id": "1"}]
  assert cluster_indices(samples).tolist() == [0, 1, 2, 0, 3]


def test_precision_f1_and_counts_see_predicted_masks():
  got = detection(SAMPLES, [4, 1, 0], "reasoning")
  assert got == {"precision": 2 / 5, "f1": 4 / 9, "masks_per_sample": 5 / 3}
  nothing = {"precision": 0.0, "f1": 0.0, "masks_per_sample": 0.0}
  assert detection([{"reasoning_ious": [0.0], "answer_ious": []}], [0], "reasoning") == nothing
  assert detection([], [], "answer") == nothing
