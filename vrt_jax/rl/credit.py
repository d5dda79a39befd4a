"""Credit for single mentions: which tokens are to thank, or to blame, for a mask.

An advantage of a whole sample praises every object of a trace for what one of them earned. What a
reasoning mask earned by itself can go to the tokens of its mention alone, which says more about
them with less noise. Source: process supervision in GRPO (arXiv 2402.03300, section 4.1.3), with a
mention as the step; here a step has its own reward only, not those of later steps, and is compared
with the same step of the group's other samples.
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

  The k-th reasoning mention earned what its mask did, minus the mean of all samples' k-th mentions,
  where a sample that has fewer earned 0. That goes to its tokens: from behind the [SEG] before it
  to its own. The tokens that follow a sample's last mention, up to the next [SEG] or the end, get 0
  minus the mean of the next mentions, so that stopping is compared with going on.
  """
  earned = np.zeros((len(samples), 1 + max(len(score.mentions) for score in scores)), np.float32)
  for row, score in zip(earned, scores, strict=True):
    row[: len(score.mentions)] = score.mentions
  earned -= earned.mean(axis=0)
  credit = np.zeros((len(samples), num_tokens), np.float32)
  for row, sample, values in zip(credit, samples, earned, strict=True):
    ends = [slot + 1 for slot in sample.seg_slots] + [sample.num_tokens]
    mentions = [i for i in sample.reasoning_indices if i < len(sample.seg_slots)]
    following = mentions[-1] + 1 if mentions else 0
    for i, value in zip([*mentions, following], values, strict=False):
      row[ends[i - 1] if i else 0 : ends[i]] = value
  return credit
