"""Metrics of parts of the data."""

import pytest

from vrt_jax.metrics.breakdowns import EVIDENCE_BINS, SIZE_BINS, bin_of, breakdowns


def detail(reasoning, answer, shares, words=3):
  return {
    "ground_truth": {
      "num_reasoning_masks": len(reasoning),
      "reasoning_area_shares": shares[: len(reasoning)],
      "answer_area_shares": shares[len(reasoning) :],
    },
    "evaluation_details": {"reasoning_ious": reasoning, "answer_ious": answer},
    "prediction": {"text": "word " * words},
  }


DETAILS = [
  detail([0.9, 0.2], [0.8], [0.005, 0.05, 0.5], words=60),
  detail([0.7], [0.0], [0.009, 0.01]),
  detail([], [0.6], [0.2], words=60),
]


def test_bins_hold_their_lower_end():
  assert [bin_of(x, SIZE_BINS) for x in (0.0, 0.0099, 0.01, 0.1, 1.0)] == [
    "below 1 %",
    "below 1 %",
    "1 to 10 %",
    "above 10 %",
    "above 10 %",
  ]
  assert [bin_of(n, EVIDENCE_BINS) for n in (0, 1, 3, 4, 40)] == [
    "0",
    "1",
    "3",
    "4 or more",
    "4 or more",
  ]


def test_by_size_every_true_mask_counts_in_its_own_bin():
  sizes = breakdowns(DETAILS)["target_size"]
  assert list(sizes) == ["below 1 %", "1 to 10 %", "above 10 %"]
  assert sizes["below 1 %"]["reasoning_miou"] == pytest.approx(0.8)
  assert sizes["below 1 %"]["answer_mask_count"] == 0
  assert sizes["1 to 10 %"]["reasoning_lq"] == sizes["1 to 10 %"]["answer_lq"] == 0
  assert sizes["above 10 %"]["answer_miou"] == pytest.approx(0.7)


def test_by_evidence_and_length_a_sample_counts_in_one_bin():
  parts = breakdowns(DETAILS)
  assert {name: part["sample_count"] for name, part in parts["num_evidence"].items()} == {
    "0": 1,
    "1": 1,
    "2": 1,
  }
  assert parts["num_evidence"]["2"]["reasoning_lq"] == 0.5
  assert {name: part["sample_count"] for name, part in parts["num_words"].items()} == {
    "below 50": 1,
    "50 to 99": 2,
  }
  assert parts["num_words"]["50 to 99"]["answer_miou"] == pytest.approx(0.7)


def test_no_samples():
  assert breakdowns([]) == {"target_size": {}, "num_evidence": {}, "num_words": {}}
