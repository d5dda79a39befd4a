"""Format and answer rewards; `tests/parity/test_rewards.py` has the reference's rules."""

import numpy as np
import pytest

from tests.rl.samples import GOOD_TEXT, honest, logits, sample, strips
from vrt_jax.rl.rewards import answer_reward, format_reward, is_orderly, trace_reward


@pytest.mark.parametrize(
  ("text", "reward"),
  [
    ("<think>a [SEG]</think>\n\n<answer>b [SEG]</answer><|im_end|>", 1.0),
    ("<think>a [SEG]</think><answer>b [SEG]</answer> and more", 1.0),
    ("<think>a</think><answer>b [SEG]</answer>", 0.5),
    ("<think>a [SEG]</think><answer>b</answer>", 0.0),
    (" <think>a [SEG]</think><answer>b [SEG]</answer>", 0.0),
    ("<think>a [SEG]<answer>b [SEG]</answer>", 0.0),
    ("<think>a [SEG]</think><answer>b [SEG]", 0.0),
    ("", 0.0),
  ],
)
def test_format_reward_literals(text, reward):
  assert format_reward(text) == reward


def test_perfect_answer_and_count_penalty():
  gt = strips((0, 100), (100, 200))
  assert answer_reward(logits((0, 100), (100, 200)), gt, [0, 1]) == pytest.approx(1.0)
  three = logits((0, 100), (100, 200), (210, 220))
  assert answer_reward(three, gt, [0, 1, 2]) == pytest.approx(0.9)
  assert answer_reward(three, gt, [1]) == pytest.approx(0.9)
  assert answer_reward(logits((0, 80), (230, 240)), gt, [0, 1]) == pytest.approx(0.8 - 0.2)


def test_nothing_good_is_zero():
  gt = strips((0, 100))
  assert answer_reward(None, gt, [0]) == 0.0
  assert answer_reward(logits((0, 100)), gt, []) == 0.0
  assert answer_reward(logits((0, 50)), gt, [0]) == 0.0  # IoU 0.5 is not good
  assert answer_reward(logits((0, 100)), strips(), [0]) == 0.0
  undecided = np.zeros((1, 256, 256), np.float32)  # sigmoid 0.5 is not inside
  assert answer_reward(undecided, np.ones((1, 256, 256), np.uint8), [0]) == 0.0


def test_index_beyond_the_masks_does_not_raise():
  gt = strips((0, 100))
  assert answer_reward(logits((0, 100)), gt, [0, 1]) == pytest.approx(1.0)
  assert answer_reward(logits((0, 100)), gt, [5]) == 0.0


def test_reference_matching_looks_at_the_first_pair_only():
  masks = logits((200, 250), (0, 100))
  gt = strips((0, 100))
  assert answer_reward(masks, gt, [0, 1], "hungarian") == pytest.approx(0.9)
  assert answer_reward(masks, gt, [0, 1], "reference") == 0.0
  assert answer_reward(masks, gt, [1, 0], "reference") == pytest.approx(0.9)
  two = strips((200, 250), (0, 100))
  assert answer_reward(masks, two, [0, 1], "reference") == pytest.approx(1.0)
  with pytest.raises(ValueError, match="matching"):
    answer_reward(masks, gt, [0], "greedy")


def test_ground_truth_is_resized_with_floor_indices():
  gt = np.zeros((1, 512, 512), np.uint8)
  gt[:, ::2, 0:200:2] = 1  # floor(2 i) hits exactly these, half-pixel centres would miss them
  assert answer_reward(logits((0, 100)), gt, [0]) == pytest.approx(1.0)


def test_trace_reward_counts_evidence_and_what_is_too_much():
  evidence = strips((0, 100), (100, 200))
  found = logits((0, 100), (100, 200), (0, 100))
  assert trace_reward(found, evidence, [0, 1]) == pytest.approx(1.0)
  assert trace_reward(found, evidence, [0]) == pytest.approx(0.9)
  assert trace_reward(found, evidence, [0, 1, 2]) == pytest.approx(0.9)  # marked twice
  assert trace_reward(found, evidence, []) == 0.0
  assert trace_reward(logits((200, 250), (0, 100)), evidence[:1], [0, 1], "reference") == 0.0


def test_orderly_texts():
  assert is_orderly(honest())
  assert not is_orderly(honest(truncated=True))
  for tag in ("<think>", "</think>", "<answer>", "</answer>"):
    assert not is_orderly(honest(text=GOOD_TEXT + tag))
  assert not is_orderly(sample("<think>[SEG]</think>", num_segs=0))  # spelled with other tokens
