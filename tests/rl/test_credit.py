"""Credit for single mentions, and what they earn."""

import numpy as np
import pytest

from tests.rl.samples import FIRST, GOOD_TEXT, SECOND, honest, sample
from vrt_jax.config import GrpoConfig
from vrt_jax.rl.credit import mention_credit
from vrt_jax.rl.rewards import Sample, mention_rewards
from vrt_jax.rl.scoring import Reward

ELSEWHERE = (90, 140)


def earned(s: Sample) -> list[float]:
  return mention_rewards(s.mask_logits, s.evidence_masks, s.reasoning_indices).tolist()


def credit(*samples: Sample, num_tokens: int = 40) -> np.ndarray:
  reward = Reward(GrpoConfig())
  return mention_credit(samples, [reward.score(s) for s in samples], num_tokens)


def test_a_mention_earns_the_iou_of_its_own_mask():
  assert earned(honest()) == pytest.approx([58 / 60, 26 / 30])
  assert earned(sample(GOOD_TEXT, ELSEWHERE, SECOND, SECOND)) == pytest.approx([-0.1, 1])
  assert earned(sample(GOOD_TEXT, FIRST, (150, 165), SECOND)) == pytest.approx([1, -0.1])  # IoU 0.5
  twice = earned(sample(GOOD_TEXT, FIRST, FIRST, SECOND))
  assert sorted(twice) == pytest.approx([-0.1, 1])


def test_mentions_without_masks_or_evidence():
  assert earned(sample(GOOD_TEXT, FIRST)) == pytest.approx([1])  # further [SEG]s have no masks
  assert earned(sample(GOOD_TEXT, mask_logits=None)) == []
  no_evidence = honest(evidence_masks=np.zeros((0, 256, 256), np.uint8))
  assert earned(no_evidence) == pytest.approx([-0.1, -0.1])


def test_a_mask_is_credited_to_its_mention_and_not_to_later_ones():
  good = sample(GOOD_TEXT, FIRST, SECOND, SECOND)  # [SEG]s at 5, 15 and, of the answer, 25
  half = sample(GOOD_TEXT, ELSEWHERE, SECOND, SECOND)
  expected = np.zeros((2, 40))
  expected[0, :6], expected[1, :6] = 1 - 0.45, -0.1 - 0.45
  np.testing.assert_allclose(credit(good, half), expected, atol=1e-6)


def test_stopping_is_compared_with_going_on():
  """Behind the first mention: one sample goes on to a good one, two stop."""
  short = "<think>a [SEG]</think><answer>b [SEG]</answer><|im_end|>"
  stops, goes_on = sample(short, FIRST, SECOND), sample(GOOD_TEXT, FIRST, SECOND, SECOND)
  silent = sample("<think>a", num_tokens=30, truncated=True)
  expected = np.zeros((3, 40))
  expected[1, :6], expected[2, :30] = 2 - 1, -1  # also what follows: 1, 2 and 0 in all
  expected[0, 6:16], expected[1, 6:16] = -1 / 3, 2 / 3
  np.testing.assert_allclose(credit(stops, goes_on, silent), expected, atol=1e-6)


def test_equal_samples_have_no_credit():
  plain = sample("<answer>[SEG]</answer>", SECOND)
  assert not credit(plain, plain).any()
  np.testing.assert_allclose(credit(honest(), honest()), 0, atol=1e-6)


def test_repeating_a_good_object_does_not_pay():
  text = "<think>a [SEG] a [SEG] a [SEG]</think><answer>b [SEG]</answer><|im_end|>"
  repeated = sample(text, FIRST, FIRST, FIRST, SECOND)
  got = credit(repeated, sample(GOOD_TEXT, FIRST, SECOND, SECOND))
  assert got[0].sum() < 0 < got[1].sum()
