"""What reinforcement learning gained over fine-tuning, as a Markdown table from finished runs.

    python -m scripts.rl_table --sft runs/shapes_sft_long --out docs/rl_shapes.md \\
      --rl runs/grpo_0 runs/grpo_1 runs/grpo_2 --without runs/answer_0 runs/answer_1 runs/answer_2

`--rl` are runs of one recipe with different seeds, `--without` the same without credit for the
reasoning masks. Differences are means over the seeds, with a paired bootstrap over pictures.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrt_jax import cli
from vrt_jax.evaluate import HEADLINE
from vrt_jax.files import write_whole
from vrt_jax.metrics.comparison import Difference, paired_difference
from vrt_jax.metrics.results import RESULTS_FILE, sample_ious


@dataclass(frozen=True)
class Args:
  """Writes the table of a fine-tuned model and the reinforcement learning that started from it."""

  sft: Path
  """Workdir of the fine-tuning."""
  rl: tuple[Path, ...]
  """Workdirs of RL from its model, a seed each."""
  out: Path
  """Markdown file."""
  without: tuple[Path, ...] = ()
  """The same without credit for the reasoning masks."""


@dataclass(frozen=True)
class Trained:
  """A finished run."""

  name: str
  seed: int
  minutes: float
  """Of its steps."""
  metrics: dict[str, float]
  samples: list[dict[str, Any]]


def read_run(workdir: Path) -> Trained:
  """A workdir's final scores; ValueError where it has none."""
  path = workdir / "eval" / "final" / RESULTS_FILE
  try:
    results = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as error:
    raise ValueError(f"{workdir} is no finished run: {error}") from error
  return Trained(
    name=workdir.name,
    seed=config["seed"],
    minutes=train_minutes([json.loads(line) for line in lines]),
    metrics=results["metrics"],
    samples=[sample_ious(detail) for detail in results["detailed_results"]],
  )


def train_minutes(lines: Sequence[dict[str, Any]]) -> float:
  """Wall time of the steps without evaluation: `step_seconds` is a mean since the line before."""
  seconds, last = 0.0, 0
  for line in lines:
    if "step_seconds" in line:
      seconds += line["step_seconds"] * (line["step"] - last)
      last = line["step"]
  return seconds / 60


def table(sft: Trained, rl: Sequence[Trained], without: Sequence[Trained], command: str) -> str:
  """The Markdown text."""
  lines = [
    "# Gains of reinforcement learning",
    "",
    f"Made by `{command}`; {len(sft.samples)} held-out samples, greedy decoding.",
    "",
    f"| run | seed | minutes of steps | {' | '.join(HEADLINE)} |",
    "|---|---|---|" + "---|" * len(HEADLINE),
    *(_row(run) for run in (sft, *rl, *without)),
    "",
    f"| difference in points | {' | '.join(HEADLINE)} |",
    "|---|" + "---|" * len(HEADLINE),
  ]
  gains = [(f"RL, mean of {len(rl)}, minus SFT", _difference(rl, [sft]))]
  if without:
    gains.append(
      (
        f"RL without mentions' credit, mean of {len(without)}, minus SFT",
        _difference(without, [sft]),
      )
    )
    gains.append(("RL with minus without", _difference(rl, without)))
  lines += [
    f"| {name} | {' | '.join(_points(d[key]) for key in HEADLINE.values())} |" for name, d in gains
  ]
  lines += ["", "In brackets the 95 % interval of a paired bootstrap over the pictures."]
  return "\n".join(lines) + "\n"


def _difference(ours: Sequence[Trained], theirs: Sequence[Trained]) -> dict[str, Difference]:
  return paired_difference([run.samples for run in ours], [run.samples for run in theirs])


def _row(run: Trained) -> str:
  numbers = " | ".join(f"{100 * run.metrics[key]:.1f}" for key in HEADLINE.values())
  return f"| {run.name} | {run.seed} | {run.minutes:.0f} | {numbers} |"


def _points(found: Difference) -> str:
  mean, low, high = (f"{100 * value:+.1f}" for value in (found.mean, found.low, found.high))
  return f"{mean} [{low}, {high}]"


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.rl_table", __doc__)
  command = " ".join(["python -m scripts.rl_table", *sys.argv[1:]])
  rl, without = ([read_run(path) for path in paths] for paths in (args.rl, args.without))
  text = table(read_run(args.sft), rl, without, command)
  write_whole(args.out, text)
  print(text, end="")


if __name__ == "__main__":
  cli.run(main)
