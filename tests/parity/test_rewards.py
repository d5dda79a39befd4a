"""RL rewards, advantages and loss against the reference's rules in PyTorch and SciPy."""

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from tests.parity.errors import max_error
from vrt_jax.losses.grpo import group_advantages, grpo_loss
from vrt_jax.rl.rewards import answer_reward, format_reward

FULL_FORM = re.compile(
  r"<think>.*?\[SEG\].*?</think>.*?<answer>.*?\[SEG\].*?</answer>.*?", re.DOTALL
)
ANSWER_FORM = re.compile(r"<think>.*?</think>.*?<answer>.*?\[SEG\].*?</answer>.*?", re.DOTALL)
EXACT = 1e-6


def torch_ious(logits: torch.Tensor, gt: torch.Tensor, resize: str = "nearest") -> torch.Tensor:
  """[N, M] IoUs at the logits' size, epsilon in the denominator."""
  size = logits.shape[-2:]
  gt = F.interpolate(gt[None].float(), size, mode=resize)[0].flatten(1)
  pred = (logits.sigmoid() > 0.5).float().flatten(1)
  intersection = pred @ gt.T
  union = pred.sum(dim=1)[:, None] + gt.sum(dim=1)[None] - intersection
  return intersection / (union + 1e-6)


def pairs(ious: torch.Tensor, quirk: bool) -> list[tuple[int, int]]:
  """Hungarian matching on 1 - IoU; with the quirk, only (0, 0) where either side is single."""
  if quirk and 1 in ious.shape:
    return [(0, 0)]
  return list(zip(*linear_sum_assignment(1 - ious.numpy()), strict=True))


def torch_answer_reward(
  logits: np.ndarray,
  gt: np.ndarray,
  indices: list[int],
  quirk: bool,
  resize: str = "nearest",
  penalty: float = 0.1,
  hit: float = 0.5,
) -> float:
  """Mean IoU of good pairs minus the penalty of what is left over, as the reference states it."""
  if not indices:
    return 0.0
  ious = torch_ious(torch.tensor(logits)[indices], torch.tensor(gt), resize)
  good = [float(ious[i, j]) for i, j in pairs(ious, quirk) if ious[i, j] > hit]
  if not good:
    return 0.0
  return float(np.mean(good)) - penalty * (sum(ious.shape) - 2 * len(good))


def cases(count: int) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
  """Mask logits, ground truth of another size and answer indices; IoUs spread around 0.5."""
  rng = np.random.default_rng(0)
  made = []
  for _ in range(count):
    num_masks, num_gt = rng.integers(1, 6, 2)
    centres = rng.uniform(0.2, 0.8, (5, 2))
    logits = _blobs(centres[:num_masks] + rng.normal(scale=0.04, size=(num_masks, 2)), 0.22, 48)
    gt = _blobs(rng.permutation(centres)[:num_gt], rng.uniform(0.15, 0.3), 97) > 0
    chosen = np.flatnonzero(rng.uniform(size=num_masks) < 0.7)
    made.append((logits.astype(np.float32), gt.astype(np.uint8), chosen.tolist()))
  return made


def _blobs(centres: np.ndarray, radius: float, size: int) -> np.ndarray:
  """[N, size, size] maps, positive within `radius` of a centre."""
  axis = (np.arange(size) + 0.5) / size
  y, x = axis[None, :, None], axis[None, None, :]
  return radius - np.hypot(y - centres[:, :1, None], x - centres[:, 1:, None])


@pytest.mark.parametrize("matching", ["reference", "hungarian"])
def test_answer_reward(matching):
  seen = []
  for logits, gt, indices in cases(300):
    expected = torch_answer_reward(logits, gt, indices, quirk=matching == "reference")
    assert abs(answer_reward(logits, gt, indices, matching) - expected) < EXACT
    seen.append(expected)
  assert len(np.unique(seen)) > 100  # not zeros and ones alone
  assert min(seen) < 0 < max(seen)


@pytest.mark.parametrize(
  "wrong",
  [
    {"quirk": False},
    {"quirk": True, "resize": "nearest-exact"},
    {"quirk": True, "penalty": 0.05},
    {"quirk": True, "hit": 0.75},
  ],
  ids=repr,
)
def test_other_rules_give_other_rewards(wrong):
  differences = [
    abs(answer_reward(*case, "reference") - torch_answer_reward(*case, **wrong))
    for case in cases(60)
  ]
  assert max(differences) > 1000 * EXACT


@pytest.mark.parametrize(("num_masks", "num_gt"), [(1, 3), (3, 1), (1, 1)])
def test_quirk_of_a_single_mask_looks_at_the_first_pair_only(num_masks, num_gt):
  centres = np.array([[0.2, 0.2], [0.5, 0.5], [0.8, 0.8]])
  logits = _blobs(centres[:num_masks], 0.15, 48).astype(np.float32)
  gt = (_blobs(centres[:num_gt], 0.15, 96) > 0).astype(np.uint8)
  indices = list(range(num_masks))
  first = answer_reward(logits, gt, indices, "reference")
  assert first == pytest.approx(torch_answer_reward(logits, gt, indices, quirk=True), abs=EXACT)
  assert first > 0.5
  reversed_gt = gt[::-1].copy()
  reversed_logits = logits[::-1].copy()
  single = answer_reward(reversed_logits, reversed_gt, indices, "reference")
  assert single == pytest.approx(
    torch_answer_reward(reversed_logits, reversed_gt, indices, quirk=True), abs=EXACT
  )
  hungarian = answer_reward(reversed_logits, reversed_gt, indices)
  assert hungarian == pytest.approx(first, abs=1e-2)
  if num_masks != num_gt:
    assert single == 0.0  # the first of three is not the partner, and no other is looked at


def test_format_reward():
  rng = random.Random(1)
  marks = ["<think>", "[SEG]", "</think>", "<answer>", "[SEG]", "</answer>", "a\n", "<obj1> "]
  wrong = 0
  seen = set()
  for _ in range(5000):
    text = "".join(rng.choices(["<think>", ""], [9, 1])) + "".join(
      rng.choices(marks, k=rng.randint(0, 10))
    )
    full = FULL_FORM.fullmatch(text) is not None
    expected = 1.0 if full else 0.5 * (ANSWER_FORM.fullmatch(text) is not None)
    assert format_reward(text) == expected
    seen.add(expected)
    counted = text.count("[SEG]") >= 2 and "</think>" in text and "</answer>" in text
    wrong += float(counted) != expected  # the marks in any order
  assert seen == {0.0, 0.5, 1.0}
  assert wrong > 100


def test_group_advantages():
  rewards = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
  rewards[0] = 0.3  # a group without spread
  groups = torch.tensor(rewards)
  centred = groups - groups.mean(dim=1, keepdim=True)
  expected = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
  ours = group_advantages(rewards.reshape(-1), 4)
  assert max_error(ours, expected.flatten()) < 1e-5
  biased = centred / (groups.std(dim=1, correction=0, keepdim=True) + 1e-4)
  assert max_error(ours, biased.flatten()) > 0.1
  over_all = (groups - groups.mean()) / (groups.std() + 1e-4)
  assert max_error(ours, over_all.flatten()) > 0.1


def test_policy_loss_and_gradient():
  rng = np.random.default_rng(3)
  logps = -rng.uniform(0.1, 4, size=(4, 9)).astype(np.float32)
  mask = np.arange(9)[None] < np.array([9, 5, 1, 7])[:, None]
  advantages = rng.normal(size=4).astype(np.float32)
  leaf = torch.tensor(logps, requires_grad=True)
  per_token = -(leaf - leaf.detach()).exp() * torch.tensor(advantages)[:, None]
  per_sample = (per_token * torch.tensor(mask)).sum(dim=1) / torch.tensor(mask.sum(axis=1))
  loss = per_sample.mean()
  (expected,) = torch.autograd.grad(loss, leaf)

  def ours(x: jax.Array) -> jax.Array:
    total, count = grpo_loss(x, jnp.asarray(mask), jnp.asarray(advantages))
    return total / count

  value, gradient = jax.value_and_grad(ours)(jnp.asarray(logps))
  assert abs(float(value) - loss.item()) < EXACT
  assert max_error(gradient, expected) < EXACT
  token_mean = -torch.tensor(advantages)[:, None] * torch.tensor(mask) / mask.sum()
  assert max_error(gradient, token_mean) > 1000 * EXACT  # a mean over all tokens
