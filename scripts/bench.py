"""python -m scripts.bench: speed beside PyTorch (and numpy), a JSON line a measurement.

python -m scripts.bench data_pipeline [--data GLOB] [--tokenizer DIR]
python -m scripts.bench rollout_group [--group-size 4] [--new-tokens 64]
python -m scripts.bench metrics_rle [--height 1500] [--width 2250]

`ratio` is the other side's time by ours: above 1 we are faster. Needs the [test] extra.
"""

import json
import sys

from scripts.bench_data import DataArgs, measure_data
from scripts.bench_metrics import MetricsArgs, measure_metrics
from scripts.bench_rollout import RolloutArgs, measure_rollout
from vrt_jax import cli

NAMES = ("data_pipeline", "rollout_group", "metrics_rle")


def main() -> None:
  """Command line: a name and its options."""
  name, *options = sys.argv[1:] or [""]
  prog = f"python -m scripts.bench {name}"
  if name == "data_pipeline":
    result = measure_data(cli.parse(DataArgs, options, prog))
  elif name == "rollout_group":
    result = measure_rollout(cli.parse(RolloutArgs, options, prog))
  elif name == "metrics_rle":
    result = measure_metrics(cli.parse(MetricsArgs, options, prog))
  elif name in ("--help", "-h"):
    print(__doc__)
    return
  else:
    raise ValueError(f"unknown measurement {name!r}: choose from {', '.join(NAMES)}")
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  cli.run(main)
