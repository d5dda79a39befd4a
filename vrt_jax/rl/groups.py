"""Groups of samples on the host: texts and masks of a rollout, their scores, and what follows.

    Rollout (devices) -> this process's rows -> Sample, Score -> figures of all rows -> GrpoBatch

Rewards are computed where the rows are; what all processes decide by is gathered from all of them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int32, UInt8

from vrt_jax.config import GrpoConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.trace import seg_roles
from vrt_jax.generate.decode import GenerationInputs, TokenIds
from vrt_jax.losses.grpo import group_advantages
from vrt_jax.placement import batch_shardings, gather_rows, local_rows, place, put_batch
from vrt_jax.rl.credit import mention_credit
from vrt_jax.rl.policy import GrpoBatch
from vrt_jax.rl.rewards import Sample
from vrt_jax.rl.rollout import Rollout
from vrt_jax.rl.scoring import Reward, Score
from vrt_jax.types import PromptBatch, PromptTruth

TOTAL = "total"
FACTS = ("length", "truncated", "entropy", "segs")
"""Of a sample, beside its rewards."""


@dataclass(frozen=True)
class Groups:
  """The scored samples of a rollout."""

  truths: tuple[PromptTruth, ...]
  """Of this process's prompts."""
  samples: list[list[Sample]]
  """[prompts][G] of this process."""
  scores: list[list[Score]]
  figures: dict[str, Float[np.ndarray, "B G"]]
  """Of the samples of all processes: each term by its name, TOTAL, and FACTS."""

  @property
  def rewards(self) -> Float[np.ndarray, "B G"]:
    """Of all processes' samples."""
    return self.figures[TOTAL]


def special_ids(tokenizer: ChatTokenizer) -> TokenIds:
  """The ids that decoding treats specially."""
  return TokenIds(
    seg=tokenizer.seg_id,
    end=tokenizer.im_end_id,
    pad=tokenizer.endoftext_id,
    forbidden=tokenizer.never_sample_ids,
  )


def put_prompts(prompts: PromptBatch, mesh: Mesh) -> GenerationInputs:
  """This process's prompts -> the inputs of all of them, divided over the mesh."""
  inputs = GenerationInputs(
    prompts.text, prompts.vision, prompts.rope_deltas, prompts.grounding_image
  )
  return put_batch(inputs, mesh)


def make_sample(
  tokens: Int32[np.ndarray, "N"],
  length: int,
  seg_slots: Int32[np.ndarray, "M"],
  low_res_masks: Float[np.ndarray, "M Y X"],
  truth: PromptTruth,
  tokenizer: ChatTokenizer,
) -> Sample:
  """One completion as reward functions see it; padding ids are dropped wherever they stand."""
  ids = tokens[:length].tolist()
  text = tokenizer.decode([i for i in ids if i != tokenizer.endoftext_id])
  reasoning, answer = seg_roles(text, "none")
  return Sample(
    text=text,
    truncated=tokenizer.im_end_id not in ids,
    mask_logits=low_res_masks[: int(np.sum(seg_slots >= 0))],
    seg_slots=seg_slots[seg_slots >= 0].tolist(),
    reasoning_indices=reasoning,
    answer_indices=answer,
    answer_masks=truth.answer_masks,
    evidence_masks=truth.evidence_masks,
    num_tokens=length,
    num_segs=ids.count(tokenizer.seg_id),
  )


def score_rollout(
  rollout: Rollout,
  truths: tuple[PromptTruth, ...],
  reward: Reward,
  tokenizer: ChatTokenizer,
  pool: ThreadPoolExecutor,
  mesh: Mesh,
) -> Groups:
  """Fetches this process's rows and scores their samples; every process calls this."""
  done = rollout.completions
  tokens, lengths, slots, masks, entropy = local_rows(
    (done.tokens, done.lengths, done.seg_slots, rollout.low_res_masks, rollout.entropy), mesh
  )
  rows, size = lengths.shape
  samples = [
    make_sample(tokens[b, g], int(lengths[b, g]), slots[b, g], masks[b, g], truths[b], tokenizer)
    for b in range(rows)
    for g in range(size)
  ]
  scores = reward.score_all(samples, pool)
  own = np.zeros((rows * size, len(reward.names) + 1 + len(FACTS)), np.float32)
  for row, sample, score in zip(own, samples, scores, strict=True):
    facts = (sample.num_tokens, sample.truncated, 0.0, sample.num_segs)
    row[:] = [*score.terms.values(), score.total, *facts]
  own[:, -2] = entropy.reshape(-1)
  everyone = gather_rows(own.reshape(rows, size, -1), mesh)
  names = (*reward.names, TOTAL, *FACTS)
  return Groups(
    truths=truths,
    samples=[samples[b * size : (b + 1) * size] for b in range(rows)],
    scores=[scores[b * size : (b + 1) * size] for b in range(rows)],
    figures={name: everyone[..., i] for i, name in enumerate(names)},
  )


def equal_groups(rewards: Float[np.ndarray, "B G"]) -> Bool[np.ndarray, "B"]:
  """Groups that teach nothing, since all their samples earned the same."""
  return rewards.max(axis=1) == rewards.min(axis=1)


def advantages_of(rewards: Float[np.ndarray, "B G"], grpo: GrpoConfig) -> Float[np.ndarray, "B G"]:
  """The advantages of samples within their groups, float32."""
  normalise = grpo.normalisation == "grpo"
  flat = group_advantages(rewards.reshape(-1), rewards.shape[1], normalise)
  return np.asarray(flat).reshape(rewards.shape)


def update_batch(
  inputs: GenerationInputs, rollout: Rollout, groups: Groups, grpo: GrpoConfig, mesh: Mesh
) -> GrpoBatch:
  """What an update needs of a rollout, divided over the mesh; advantages are still zero.

  A group's best sample is the first of those with its highest reward.
  """
  best = [int(np.argmax([s.total for s in group])) for group in groups.scores]
  chosen = [group[i] for group, i in zip(groups.samples, best, strict=True)]
  is_answer = np.zeros((len(chosen), grpo.max_masks), bool)
  for row, sample in zip(is_answer, chosen, strict=True):
    row[[i for i in sample.answer_indices if i < len(sample.mask_logits)]] = True
  length = rollout.completions.tokens.shape[-1]
  credit = [
    mention_credit(samples, scores, length)
    for samples, scores in zip(groups.samples, groups.scores, strict=True)
  ]
  own: dict[str, Any] = {
    "advantages": np.zeros((len(best), len(groups.scores[0])), np.float32),
    "credit": grpo.mention_weight * np.stack(credit),
    "best": np.asarray(best, np.int32),
    "best_valid": np.asarray([len(s.mask_logits) > 0 for s in chosen]),
    "best_is_answer": is_answer,
    "answer_mask": np.stack([union(t.answer_masks) for t in groups.truths]),
  }
  batch = GrpoBatch(
    prompts=inputs.text,
    rope_deltas=inputs.rope_deltas,
    visual=rollout.visual,
    image=rollout.image,
    completions=rollout.completions,
    **put_batch(own, mesh),
  )
  return jax.device_put(batch, batch_shardings(batch, mesh))


def with_advantages(
  batch: GrpoBatch, advantages: Float[np.ndarray, "B G"], mesh: Mesh
) -> GrpoBatch:
  """The batch with the advantages of all its samples, of which every process has all."""
  return batch.replace(advantages=place(advantages, batch_shardings(advantages, mesh)))


def union(masks: UInt8[np.ndarray, "N Y X"]) -> UInt8[np.ndarray, "Y X"]:
  """Pixels of any mask; 0 or 1."""
  return np.any(masks, axis=0).astype(np.uint8)


def refill_source(
  kept: Float[np.ndarray, "B G"], fresh: Float[np.ndarray, "B G"]
) -> Int32[np.ndarray, "B"]:
  """For each kept group the fresh one that takes its place, -1 where it stays.

  Equal groups give way to fresh ones that are not equal, both in their order:
  [[1, 1], [0, 1], [0, 0]] and [[1, 0], [1, 1], [1, 1]] -> [0, -1, -1].
  """
  source = np.full(len(kept), -1, np.int32)
  missing, good = np.flatnonzero(equal_groups(kept)), np.flatnonzero(~equal_groups(fresh))
  count = min(len(missing), len(good))
  source[missing[:count]] = good[:count]
  return source


def joined_rewards(
  kept: Float[np.ndarray, "B G"], source: Int32[np.ndarray, "B"], fresh: Float[np.ndarray, "B G"]
) -> Float[np.ndarray, "B G"]:
  """The rewards of a batch whose groups were replaced."""
  return np.where(source[:, None] >= 0, fresh[np.maximum(source, 0)], kept)


def reward_figures(rollouts: Sequence[Groups], names: Sequence[str]) -> dict[str, float]:
  """Means over all samples of a step, those of refills too, by the names of metrics.jsonl."""
  figures = {
    name: np.concatenate([groups.figures[name] for groups in rollouts])
    for name in rollouts[0].figures
  }
  rewards = figures[TOTAL]
  values = {f"reward/{name}": figures[name].mean() for name in names}
  values |= {
    "reward/mean": rewards.mean(),
    "reward/std": rewards.std(axis=1, ddof=1).mean(),
    "reward/zero_std_share": equal_groups(rewards).mean(),
    "rollout/length": figures["length"].mean(),
    "rollout/truncated_share": figures["truncated"].mean(),
    "rollout/entropy": figures["entropy"].mean(),
    "rollout/segs": figures["segs"].mean(),
  }
  return {name: float(value) for name, value in values.items()}
