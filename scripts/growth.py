"""How a training step's time and memory grow, as a picture and a JSON file.

    python -m scripts.growth --out docs/growth

measures the SFT step (LoRA, float32) of a small model on this machine against the tokens of a
sample, its objects, the samples of a batch and the side of SAM 2's picture, one at a time. Time is
the median of the steps, memory what the compiled program needs beside its arguments. Writes
growth.png and growth.json; the exponents are those of the last two points: 1 is linear.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from scripts.bench_model import MODEL, Subject, with_lora
from scripts.bench_runs import medians
from scripts.bench_sft import prepared_step, training_batch
from vrt_jax import cli
from vrt_jax.config import ModelConfig
from vrt_jax.files import write_whole
from vrt_jax.sizes import SAM2_SIZES

SMALL = with_lora(
  replace(
    MODEL,
    vision=replace(
      MODEL.vision,
      depth=4,
      hidden_size=256,
      num_heads=4,
      intermediate_size=1024,
      out_hidden_size=512,
      deepstack_indexes=(0, 1, 2),
    ),
    text=replace(
      MODEL.text,
      vocab_size=16384,
      hidden_size=512,
      num_layers=4,
      num_heads=8,
      num_kv_heads=4,
      intermediate_size=1536,
    ),
    sam2=replace(SAM2_SIZES["tiny"], image_size_px=512),
  ),
  16,
)
"""Whose step takes about a second on two cores."""
PICTURE = (256, 256)
"""(height, width) that the text model sees: 64 tokens."""


@dataclass(frozen=True)
class Args:
  """Measures the growth of the SFT step and writes OUT.png and OUT.json."""

  out: Path
  """Path without ending."""
  repeats: int = 3


@dataclass(frozen=True)
class Shape:
  """What a step computes with."""

  text_tokens: int = 448
  objects: int = 4
  batch: int = 1
  picture_px: int = 512
  """Side of SAM 2's picture."""


@dataclass(frozen=True)
class Point:
  """A measured step."""

  x: int
  seconds: float
  mib: float
  """Temporary memory of the compiled step in MiB."""


SWEEPS: dict[str, tuple[int, ...]] = {
  "text_tokens": (448, 960, 1984, 4032),
  "objects": (1, 4, 16, 64),
  "batch": (1, 2, 4, 8),
  "picture_px": (256, 512, 768, 1024),
}
"""A field of `Shape` and its values; the others keep their defaults."""
TITLES = {
  "text_tokens": "text tokens of a sample, beside 64 of the picture",
  "objects": "objects of a sample",
  "batch": "samples of a batch",
  "picture_px": "side of SAM 2's picture in pixels",
}


def measure(name: str, x: int, repeats: int, config: ModelConfig = SMALL) -> Point:
  """The step with one field of `Shape` set to `x`."""
  shape = replace(Shape(), **{name: x})
  subject = Subject(
    replace(config, sam2=replace(config.sam2, image_size_px=shape.picture_px)),
    PICTURE,
    shape.text_tokens,
  )
  batch = training_batch(subject, shape.batch, shape.objects)
  compiled, run = prepared_step(subject, batch)
  seconds = medians({"step": run}, repeats)["step"]
  analysis = compiled.memory_analysis()
  assert analysis is not None
  mib = analysis.temp_size_in_bytes / 2**20
  return Point(x, round(seconds, 3), round(mib, 1))


def exponent(points: Sequence[Point], field: str) -> float:
  """b of y = a x^b through the last two points; of memory or time."""
  first, last = points[-2:]
  ratio = getattr(last, field) / getattr(first, field)
  return round(math.log(ratio) / math.log(last.x / first.x), 2)


def draw(path: Path, sweeps: dict[str, list[Point]]) -> None:
  """A column a sweep: time above, memory below."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4 * len(sweeps), 6), layout="constrained")
  panels = figure.subplots(2, len(sweeps), sharex="col", squeeze=False)
  rows = (("seconds", "seconds a step"), ("mib", "MiB of temporaries"))
  for column, (name, points) in zip(panels.T, sweeps.items(), strict=True):
    for panel, (field, label) in zip(column, rows, strict=True):
      y = [getattr(point, field) for point in points]
      panel.plot([point.x for point in points], y, marker="o")
      panel.set_ylim(0, 1.15 * max(y))
      panel.set_title(f"exponent {exponent(points, field)}", fontsize=10, loc="left")
      panel.grid(alpha=0.3)
      panel.set_ylabel(label)
    column[-1].set_xlabel(TITLES[name])
    column[-1].set_xticks([point.x for point in points])
  figure.savefig(path, dpi=80)


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.growth", __doc__)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  sweeps: dict[str, list[Point]] = {name: [] for name in SWEEPS}
  todo = [(name, x) for name, values in SWEEPS.items() for x in values]
  for name, x in tqdm(todo, "growth"):
    sweeps[name].append(measure(name, x, args.repeats))
  found = {
    name: {
      "points": [asdict(point) for point in points],
      "time_exponent": exponent(points, "seconds"),
      "memory_exponent": exponent(points, "mib"),
    }
    for name, points in sweeps.items()
  }
  write_whole(args.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
  draw(args.out.with_suffix(".png"), sweeps)
  for name, line in found.items():
    print(f"{name}: time ~ x^{line['time_exponent']}, memory ~ x^{line['memory_exponent']}")


if __name__ == "__main__":
  cli.run(main)
