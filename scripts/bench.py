"""python -m scripts.bench: speed beside PyTorch (and numpy), a JSON line a measurement.

python -m scripts.bench prefill decode_b1 sam2_encode [--repeats 5]
python -m scripts.bench data_pipeline [--data GLOB] [--tokenizer DIR]
python -m scripts.bench rollout_group [--group-size 4] [--new-tokens 64]
python -m scripts.bench metrics_rle [--height 1500] [--width 2250]

`ratio` is the other side's time by ours: above 1 we are faster. Needs the [test] extra. Names that
share options may be given together.
"""

import json
import sys

from scripts.bench_data import DataArgs, measure_data
from scripts.bench_metrics import MetricsArgs, measure_metrics
from scripts.bench_rollout import RolloutArgs, measure_rollout
from scripts.bench_sft import measure_sft
from scripts.bench_speed import SPEED_NAMES, SpeedArgs, measure_speed
from vrt_jax import cli

NAMES = (*SPEED_NAMES, "sft_step", "rollout_group", "data_pipeline", "metrics_rle")


def main() -> None:
  """Command line: names and their options."""
  words = sys.argv[1:]
  count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
  names, options = words[:count], words[count:]
  if options[:1] in (["--help"], ["-h"]) and not names:
    print(f"{__doc__}\nusage: python -m scripts.bench NAME .. [--help] [options of the names]\n")
    print(f"NAME: {', '.join(NAMES)}")
    raise SystemExit(0)
  unknown = [name for name in names or [""] if name not in NAMES]
  if unknown:
    raise ValueError(f"unknown measurement {unknown[0]!r}: choose from {', '.join(NAMES)}")
  for name in names:
    print(json.dumps(measure(name, options)), flush=True)


def measure(name: str, options: list[str]) -> dict:
  """The line of a measurement with its options."""
  prog = f"python -m scripts.bench {name}"
  if name == "data_pipeline":
    return measure_data(cli.parse(DataArgs, options, prog))
  if name == "rollout_group":
    return measure_rollout(cli.parse(RolloutArgs, options, prog))
  if name == "metrics_rle":
    return measure_metrics(cli.parse(MetricsArgs, options, prog))
  if name == "sft_step":
    return measure_sft(cli.parse(SpeedArgs, options, prog))
  return measure_speed(name, cli.parse(SpeedArgs, options, prog))


if __name__ == "__main__":
  cli.run(main)
