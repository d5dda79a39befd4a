"""python -m vrt_jax.train: runs a recipe; without arguments, the embedded one.

python -m vrt_jax.train
python -m vrt_jax.train --config configs/photos_smoke.py --data.train 'records-*.tfrecord'
python -m vrt_jax.train --workdir runs/mine --optim.learning-rate 1e-4

The same command goes on where a run stopped. At SIGTERM the step is finished and saved, and the
exit status is 143. Several processes, each with this command, find each other on TPU pods and under
SLURM; elsewhere by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import argparse
import importlib.util
import logging
import math
import sys
from pathlib import Path

from vrt_jax import cli
from vrt_jax.config import TrainConfig


def load_recipe(path: Path) -> TrainConfig:
  """The TrainConfig that get_config() of a recipe file returns.

  Raises:
    ValueError: no such file, not Python, or no get_config() that returns a TrainConfig.
  """
  if not path.is_file():
    raise ValueError(f"recipe {path} does not exist")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None:
    raise ValueError(f"recipe {path} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise ValueError(f"recipe {path}, line {error.lineno}: {error.msg}") from error
  if not hasattr(module, "get_config"):
    raise ValueError(f"recipe {path} has no get_config()")
  config = module.get_config()
  if not isinstance(config, TrainConfig):
    raise ValueError(f"get_config() of {path} returns a {type(config).__name__}")
  return config


def main() -> None:
  """Parses the command line and trains."""
  parser = argparse.ArgumentParser(
    prog="vrt_jax.train", add_help=False, allow_abbrev=False, exit_on_error=False
  )
  parser.add_argument("--config", type=Path)
  parser.add_argument("--workdir", type=Path)
  try:
    own, rest = parser.parse_known_args(sys.argv[1:])
  except argparse.ArgumentError as error:
    raise ValueError(f"{error} (see --help)") from None
  default = load_recipe(own.config) if own.config else TrainConfig()
  name = own.config.stem if own.config else "shapes_sft"
  config = cli.parse(TrainConfig, rest, "python -m vrt_jax.train", __doc__, default)
  workdir = own.workdir or Path("runs") / name

  from vrt_jax.runtime import say, start_processes, use_cpu_cores  # after --help: it needs no JAX
  from vrt_jax.train.loop import train

  for name in ("absl", "asyncio"):  # Orbax logs what it also raises
    logging.getLogger(name).setLevel(logging.CRITICAL)
  start_processes()
  use_cpu_cores(
    math.gcd(config.optim.batch_size // config.optim.accumulation_steps, config.eval.batch_size)
  )
  train(config, workdir)
  say(f"model: {workdir / 'model'}")
  if (workdir / "eval" / "final").is_dir():
    say(f"pictures and scores: {workdir / 'eval' / 'final'}")


def command() -> None:
  """The installed command: `main` with errors as one line."""
  cli.run(main)


if __name__ == "__main__":
  command()
