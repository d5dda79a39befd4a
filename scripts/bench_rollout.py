"""How fast a group of samples comes from one prompt, here and in transformers.

The random model of middle size, a prompt of 256 visual and 64 text tokens, the same weights on both
sides, float32. Ours is the rollout of RL: text with log-probabilities, a tiny SAM 2 and masks;
transformers' `generate` with num_return_sequences writes the text alone. No sample ends early. The
sides take turns, and medians of wall-clock time are compared; programs are compiled before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scripts.bench_model import Subject
from scripts.bench_runs import medians
from scripts.bench_speed import LANGUAGE
from vrt_jax.config import GrpoConfig

MASKS = 4


@dataclass(frozen=True)
class RolloutArgs:
  """Measures a group of samples of one prompt."""

  group_size: int = 4
  new_tokens: int = 128
  temperature: float = 1.2
  """0 is greedy: then both sides write the same."""
  repeats: int = 5


def measure_rollout(args: RolloutArgs, subject: Subject | None = None) -> dict:
  """The line of results; ratios above 1 mean that we are faster."""
  subject = subject or Subject(LANGUAGE)
  group, single, theirs = sides(args, subject)
  runs = {"jax": group, "single": single, "torch": theirs}
  median = medians(runs, args.repeats)
  return {
    "name": "rollout_group",
    "unit": "s a group",
    "jax": round(median["jax"], 3),
    "torch": round(median["torch"], 3),
    "ratio": round(median["torch"] / median["jax"], 2),
    "group_over_single": round(median["jax"] / median["single"], 2),
    "group_size": args.group_size,
    "prompt_tokens": len(subject.prompt().input_ids),
    "new_tokens": args.new_tokens,
    "repeats": args.repeats,
  }


def sides(
  args: RolloutArgs, subject: Subject
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray], Callable[[], np.ndarray]]:
  """(a group, a single sample, transformers' group): each gives its tokens [G, N]."""
  from converters.torch_group import torch_group

  grpo = GrpoConfig(
    group_size=args.group_size,
    max_new_tokens=args.new_tokens,
    max_masks=MASKS,
    temperature=args.temperature,
  )
  return (
    our_rollout(subject, grpo),
    our_rollout(subject, replace(grpo, group_size=1)),
    torch_group(subject.model, subject.prompt(), subject.tokenizer, grpo),
  )


def our_rollout(subject: Subject, grpo: GrpoConfig) -> Callable[[], np.ndarray]:
  """The rollout as training runs it."""
  import jax
  from flax import nnx

  from vrt_jax.generate.decode import TokenIds
  from vrt_jax.rl.rollout import make_rollout
  from vrt_jax.train.state import Frozen

  tokenizer = subject.tokenizer
  never = -1  # no token ends a sample
  ids = TokenIds(tokenizer.seg_id, never, tokenizer.endoftext_id, tokenizer.never_sample_ids)
  frozen = Frozen(*nnx.split(subject.model)).apart()
  inputs = subject.inputs(subject.prompt())
  rollout = make_rollout(grpo, ids)
  key = jax.random.key(0)

  def run() -> np.ndarray:
    out = jax.block_until_ready(rollout(nnx.State({}), frozen, inputs, key))
    return np.asarray(out.completions.tokens[0])

  return run
