"""The prompts whose reward varies most, for reinforcement learning.

    python -m scripts.select_rl_subset --checkpoint DIR --data GLOB --out keys.json --top K

Samples a group of the model for every record, scores it as training would, and keeps the K prompts
whose rewards have the largest variance (of equals the first key). The file goes to `--data.keys`:

    {"samples": {key: {"mean": .., "std": .., "rewards": [..]}}, "settings": {..}, "unusable": {..}}

What is done is kept in `<out>.partial.jsonl`; the same command goes on from there and gives the
same file. Several processes (`vrt_jax.runtime.start_processes`) share every batch.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from vrt_jax import cli, model_directory
from vrt_jax.config import GrpoConfig, MeshConfig, NearestMode
from vrt_jax.cores import usable_cores
from vrt_jax.data.buckets import check_buckets
from vrt_jax.data.prompts import (
  PromptExample,
  check_prompt_fits,
  collate_prompts,
  make_prompt_example,
)
from vrt_jax.data.sources import Source, train_source
from vrt_jax.files import write_whole
from vrt_jax.model_directory import Loaded
from vrt_jax.partial import Partial
from vrt_jax.placement import gather_rows, replicate
from vrt_jax.rl.groups import put_prompts, score_rollout, special_ids
from vrt_jax.rl.rollout import make_rollout
from vrt_jax.rl.scoring import Reward
from vrt_jax.runtime import (
  barrier,
  batch_parts,
  data_share,
  is_leader,
  make_mesh,
  say,
  start_processes,
  with_tensor,
)
from vrt_jax.train.state import Frozen

DIGITS = 6
"""Of rewards in the file."""


@dataclass(frozen=True)
class Args:
  """Chooses the training prompts whose reward varies most over a group of samples."""

  data: str
  """Path or glob of the VRT-80k TFRecord files, or the folder of a prepared set."""
  out: Path
  """The keys file."""
  top: int
  """Prompts that are kept."""
  checkpoint: str = "shapes"
  """Model directory; the shipped shapes model where left out."""
  batch_size: int = 16
  """Prompts of a rollout."""
  mask_resize: NearestMode = "nearest"
  """As data.mask_resize of the recipe."""
  seed: int = 0
  grpo: GrpoConfig = field(default_factory=lambda: GrpoConfig(max_new_tokens=160, max_masks=12))
  """Sampling and rewards, as in the recipe; the sizes are those of the shapes world."""
  mesh: MeshConfig = field(default_factory=MeshConfig)
  """mesh.tensor or grpo.rollout_tensor divide a large model; with neither every device has it."""


def settings_of(args: Args) -> dict:
  """What the rewards depend on, as it reads back from JSON."""
  named = dataclasses.asdict(args)
  del named["grpo"]["rollout_tensor"]
  return json.loads(json.dumps({k: v for k, v in named.items() if k not in ("out", "top", "mesh")}))


def example_of(
  source: Source, number: int, loaded: Loaded, args: Args
) -> tuple[PromptExample | None, str]:
  """(prompt, "") of a record, or (None, why it is unusable)."""
  try:
    example = make_prompt_example(source[number], loaded.tokenizer, loaded.image, args.mask_resize)
    check_prompt_fits(example, args.grpo.prompt_buckets)
  except ValueError as error:
    return None, str(error).partition(":")[0]
  return example, ""


def filler(source: Source, loaded: Loaded, args: Args) -> PromptExample:
  """The first usable prompt, which stands in the place of those that are not.

  Raises:
    ValueError: no record is usable.
  """
  reasons: Counter[str] = Counter()
  for number in range(len(source)):
    example, reason = example_of(source, number, loaded, args)
    if example is not None:
      return example
    reasons[reason] += 1
  raise ValueError(f"no record of {args.data} can be used: {dict(reasons)}")


def score_batches(
  args: Args, loaded: Loaded, source: Source, first: int, mesh: jax.sharding.Mesh
) -> Iterator[dict]:
  """Results of the batches from number `first` on, the same on every process."""
  graphdef, params = nnx.split(loaded.model)
  frozen = Frozen(graphdef, params).on(mesh).apart()
  rollout = make_rollout(args.grpo, special_ids(loaded.tokenizer), mesh.abstract_mesh)
  reward, key = Reward(args.grpo), jax.random.key(args.seed)
  side = int(loaded.model.config.vision.num_position_embeddings**0.5)
  index, count = data_share(mesh)
  rows = args.batch_size // count
  spare = filler(source, loaded, args)
  largest = args.grpo.prompt_buckets[-1:]
  with ThreadPoolExecutor(usable_cores()) as pool:
    for batch in range(first, -(-len(source) // args.batch_size)):
      start = batch * args.batch_size
      own = range(start + index * rows, start + (index + 1) * rows)
      made = [example_of(source, n, loaded, args) if n < len(source) else (None, "") for n in own]
      examples = [example or spare for example, _ in made]
      prompts = collate_prompts(examples, loaded.tokenizer, loaded.image, side, largest)
      batch_key = replicate(jax.random.fold_in(key, batch), mesh)
      out = rollout(nnx.State({}), frozen, put_prompts(prompts, mesh), batch_key)
      groups = score_rollout(out, prompts.truths, reward, loaded.tokenizer, pool, mesh)
      yield batch_result(source, start, made, groups.rewards, mesh)


def batch_result(
  source: Source,
  start: int,
  made: list[tuple[PromptExample | None, str]],
  rewards: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> dict:
  """{"samples": {key: [rewards]}, "unusable": {reason: count}} of all rows of a batch."""
  width = 256  # of a key or a reason, so that all processes have arrays of one size
  texts = np.zeros((len(made), width), np.uint8)
  for row, (example, reason) in zip(texts, made, strict=True):
    letters = ("+" + example.truth.key if example else "-" + reason).encode()
    if len(letters) > width:
      raise ValueError(f"the key {example.truth.key if example else reason} is too long")
    row[: len(letters)] = list(letters)
  samples: dict[str, list[float]] = {}
  unusable: Counter[str] = Counter()
  for row, values in zip(gather_rows(texts, mesh), rewards, strict=True):
    text = bytes(row).rstrip(b"\0").decode()
    if text.startswith("+"):
      samples[text[1:]] = [round(float(v), DIGITS) for v in values]
    elif text != "-":
      unusable[text[1:]] += 1
  return {"samples": samples, "unusable": dict(unusable)}


def best_prompts(rewards: dict[str, list[float]], top: int) -> dict[str, dict]:
  """The `top` prompts of the largest variance (ddof 1), the first keys of equals."""
  spread = {key: float(np.std(values, ddof=1)) for key, values in rewards.items()}
  chosen = sorted(rewards, key=lambda key: (-round(spread[key], DIGITS), key))[:top]
  return {
    key: {
      "mean": round(float(np.mean(rewards[key])), DIGITS),
      "std": round(spread[key], DIGITS),
      "rewards": rewards[key],
    }
    for key in chosen
  }


def rollout_mesh(args: Args) -> jax.sharding.Mesh:
  """The mesh that samples are drawn on; ValueError where it does not fit the devices."""
  return with_tensor(make_mesh(args.mesh), args.grpo.rollout_tensor)


def select(args: Args, loaded: Loaded) -> dict:
  """Scores all records and writes the keys file; returns its content.

  Raises:
    ValueError: one line that says what is wrong with the arguments or the data.
  """
  mesh = rollout_mesh(args)
  parts = batch_parts(mesh)
  if args.top < 1 or args.batch_size < 1 or args.batch_size % parts:
    raise ValueError(
      f"top {args.top} and batch_size {args.batch_size} must be positive, and batch_size a "
      f"multiple of {parts}, the parts of the mesh (data x fsdp)"
    )
  if args.grpo.group_size < 2:
    raise ValueError(f"grpo.group_size is {args.grpo.group_size}, a variance needs 2")
  check_buckets(args.grpo.prompt_buckets, "grpo.prompt_buckets")
  source, settings = train_source(args.data), settings_of(args)
  if len(source) == 0:
    raise ValueError(f"no training records in {args.data}")
  partial = Partial(args.out.with_name(args.out.name + ".partial.jsonl"), settings)
  done = len(partial.entries)
  bar = tqdm(
    total=-(-len(source) // args.batch_size), initial=done, unit="batch", disable=not is_leader()
  )
  with bar:
    if done < bar.total:
      for result in score_batches(args, loaded, source, done, mesh):
        partial.add(result)
        bar.update()
  rewards = {key: values for batch in partial.entries for key, values in batch["samples"].items()}
  unusable = sum((Counter(batch["unusable"]) for batch in partial.entries), Counter())
  content = {
    "samples": best_prompts(rewards, args.top),
    "settings": settings,
    "unusable": dict(unusable),
  }
  if is_leader():
    write_whole(args.out, json.dumps(content, indent=1) + "\n")
  partial.remove()
  barrier("the keys are written")
  return content


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.select_rl_subset", __doc__)
  start_processes()
  content = select(args, model_directory.load(args.checkpoint, mesh=rollout_mesh(args)))
  say(f"{args.out}: {len(content['samples'])} keys; unusable records: {content['unusable']}")


if __name__ == "__main__":
  cli.run(main)
