"""Credit for single mentions: which tokens are to thank, or to blame, for a mask.

An advantage of a whole sample praises every object of a trace for what one of them earned. What
reasoning masks earn by themselves can go to the tokens of their own mentions and of those before
them, which could still change it, and not to those after. Source: process supervision in GRPO
(arXiv 2402.03300, section 4.1.3), with a mention as the step.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vrt_jax.rl.rewards import Sample
from vrt_jax.rl.scoring import Score


def mention_credit(
  samples: Sequence[Sample], scores: Sequence[Score], num_tokens: int
) -> Float[np.ndarray, "G N"]:
  """What is added to the advantages of the tokens of a group's samples, float32.

  The tokens of the k-th reasoning mention, from behind the [SEG] before it to its own, get what
  this and all later ones earned, minus the mean of that over the samples, where one that has fewer
  mentions earned 0. The tokens behind a sample's last mention, up to the next [SEG] or the end, get
  0 minus the mean of the next mentions: stopping is compared with going on.
  """
  earned = np.zeros((len(samples), 1 + max(len(score.mentions) for score in scores)), np.float32)
  for row, score in zip(earned, scores, strict=True):
    row[: len(score.mentions)] = score.mentions
  earned = np.cumsum(earned[:, ::-1], axis=1)[:, ::-1]
  earned = earned - earned.mean(axis=0)
  credit = np.zeros((len(samples), num_tokens), np.float32)
  for row, sample, values in zip(credit, samples, earned, strict=True):
    ends = [slot + 1 for slot in sample.seg_slots] + [sample.num_tokens]
    mentions = [i for i in sample.reasoning_indices if i < len(sample.seg_slots)]
    following = mentions[-1] + 1 if mentions else 0
    for i, value in zip([*mentions, following], values, strict=False):
      row[ends[i - 1] if i else 0 : ends[i]] = value
  return credit
