"""From a rollout's arrays to samples, scores, figures and the update's input."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tests import tiny
from tests.rl import group_case
from vrt_jax.config import GrpoConfig, MeshConfig
from vrt_jax.placement import put_batch
from vrt_jax.rl.credit import mention_credit
from vrt_jax.rl.groups import make_sample, reward_figures, score_rollout, special_ids, update_batch
from vrt_jax.rl.rollout import Rollout
from vrt_jax.rl.scoring import Reward
from vrt_jax.runtime import make_mesh
from vrt_jax.types import Completions, PromptTruth

GRPO = GrpoConfig(
  group_size=2, max_masks=3, extra_rewards=(("tests.rl.user_rewards:brevity", 1.0),)
)
SIDE = 16
TEXTS = (
  ("<think>a [SEG] c [SEG]</think><answer>b [SEG]</answer><|im_end|>", "<think>a"),
  ("x [SEG] y<|im_end|>", "<answer>[SEG]</answer>[SEG]<|im_end|>"),
)


def truth(index: int) -> PromptTruth:
  masks = np.zeros((2, SIDE, SIDE), np.uint8)
  masks[0, :, :4], masks[1, :, 2 + index : 8] = 1, 1
  return PromptTruth(f"key_{index}", "Which?", (20, 30), masks, masks[:1])


def rollout() -> Rollout:
  """The texts as the tiny tokenizer writes them; mask m of a sample covers columns 4m to 4m + 4."""
  t = tiny.tokenizer()
  ids = [[t.encode(text) for text in group] for group in TEXTS]
  n = max(len(i) for group in ids for i in group) + 1
  tokens = np.full((2, 2, n), t.endoftext_id, np.int32)
  slots = np.full((2, 2, 3), -1, np.int32)
  for b, group in enumerate(ids):
    for g, row in enumerate(group):
      tokens[b, g, : len(row)] = row
      places = np.flatnonzero(np.asarray(row) == t.seg_id)
      slots[b, g, : len(places)] = places
  masks = np.full((2, 2, 3, SIDE, SIDE), -3.0, np.float32)
  for m in range(3):
    masks[:, :, m, :, 4 * m : 4 * m + 4] = 3.0
  lengths = np.asarray([[len(row) for row in group] for group in ids], np.int32)
  entropy = np.asarray([[0.5, 1.0], [1.5, 2.0]], np.float32)
  logps = np.zeros(tokens.shape, np.float32)
  visual = {"visual": np.arange(2.0), "image": np.arange(2.0)}
  return Rollout(Completions(tokens, lengths, logps, slots), entropy, masks, **visual)


@pytest.fixture(scope="module")
def scored():
  mesh = make_mesh(MeshConfig())
  placed = put_batch(rollout(), mesh)
  with ThreadPoolExecutor(2) as pool:
    groups = score_rollout(placed, (truth(0), truth(1)), Reward(GRPO), tiny.tokenizer(), pool, mesh)
  return placed, groups, mesh


def test_samples_have_text_roles_and_masks(scored):
  _, groups, _ = scored
  good, cut = groups.samples[0]
  assert good.text == TEXTS[0][0]
  assert (good.reasoning_indices, good.answer_indices) == ([0, 1], [2])
  assert good.mask_logits.shape == (3, SIDE, SIDE)
  assert not good.truncated and cut.truncated
  assert len(cut.mask_logits) == 0
  assert (good.num_segs, good.num_tokens) == (3, len(tiny.tokenizer().encode(TEXTS[0][0])))
  no_roles = groups.samples[1][0]
  assert (no_roles.reasoning_indices, no_roles.answer_indices) == ([], [])
  np.testing.assert_array_equal(groups.samples[1][0].answer_masks, truth(1).answer_masks)


def test_padding_is_dropped_wherever_it_stands():
  t = tiny.tokenizer()
  ids = [t.endoftext_id, *t.encode("<think>a"), t.endoftext_id, *t.encode(" b"), t.im_end_id]
  slots, masks = np.full(3, -1, np.int32), np.zeros((3, SIDE, SIDE), np.float32)
  made = make_sample(np.asarray(ids, np.int32), len(ids), slots, masks, truth(0), t)
  assert made.text == "<think>a b<|im_end|>"
  assert made.num_tokens == len(ids)


def test_figures_of_all_samples(scored):
  _, groups, _ = scored
  figures = reward_figures([groups, groups], Reward(GRPO).names)
  assert figures["reward/format"] == pytest.approx(1 / 4)
  lengths = [[s.num_tokens for s in group] for group in groups.samples]
  assert figures["rollout/length"] == pytest.approx(np.mean(lengths))
  assert figures["rollout/truncated_share"] == pytest.approx(1 / 4)
  assert figures["rollout/entropy"] == pytest.approx(1.25)
  assert figures["rollout/segs"] == pytest.approx((3 + 0 + 1 + 2) / 4)
  totals = np.asarray([[s.total for s in group] for group in groups.scores])
  assert figures["reward/mean"] == pytest.approx(totals.mean(), abs=1e-6)
  assert figures["reward/std"] == pytest.approx(totals.std(axis=1, ddof=1).mean(), abs=1e-6)
  assert figures["reward/zero_std_share"] == 0.0


def test_the_update_sees_the_best_samples(scored):
  placed, groups, mesh = scored
  inputs = put_batch(group_case.inputs(2), mesh)
  grpo = dataclasses.replace(GRPO, mention_weight=2.0)
  batch = jax.device_get(update_batch(inputs, placed, groups, grpo, mesh))
  totals = [[s.total for s in group] for group in groups.scores]
  assert batch.best.tolist() == [int(np.argmax(t)) for t in totals]
  assert batch.best[0] == 0
  assert batch.best_is_answer[0].tolist() == [False, False, True]
  assert batch.best_valid.tolist() == [True, True]
  np.testing.assert_array_equal(batch.answer_mask[1], truth(1).answer_masks.max(axis=0))
  assert batch.advantages.tolist() == [[0, 0], [0, 0]]
  length = placed.completions.tokens.shape[-1]
  pairs = zip(groups.samples, groups.scores, strict=True)
  expected = [mention_credit(*pair, length) for pair in pairs]
  assert np.any(expected)
  np.testing.assert_allclose(batch.credit, 2.0 * np.asarray(expected))
  assert special_ids(tiny.tokenizer()) == group_case.ids()
