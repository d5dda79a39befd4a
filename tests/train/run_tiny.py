"""A whole run of the tiny model, for tests that start it as a process of its own.

    python -m tests.train.run_tiny RECORDS WORKDIR '{"steps": 4, "kill_at": 3, ...}'

Keys of the JSON: fields of TrainConfig and OptimConfig, `mesh` (data, fsdp, tensor), `devices`
(of a CPU process), `buckets`, and three ways to fail: `kill_at` and `term_at` send SIGKILL and
SIGTERM to the process while that step's batch is made, the batches of the steps `poison` are not
finite.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from tests import tiny
from vrt_jax import cli
from vrt_jax.config import GrpoConfig, MeshConfig, TrainConfig, from_dict
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.data.records import TFRecordWriter, serialize_eval
from vrt_jax.runtime import start_processes
from vrt_jax.train.loop import train
from vrt_jax.types import Batch

NUM_RECORDS = 8
TINY_GRPO = {
  "group_size": 3,
  "max_new_tokens": 12,
  "max_masks": 3,
  "prompt_buckets": [[256, 64]],
  "extra_rewards": [["tests.rl.user_rewards:letters", 1.0]],
}
"""A random model earns nothing; the user's reward tells its samples apart."""
OPTIM = {field.name for field in dataclasses.fields(tiny.train_config().optim)}


def write_records(folder: Path) -> Path:
  """Training and held-out records and the tokenizer, which costs seconds to train."""
  folder.mkdir(exist_ok=True)
  tiny.write_train(folder / "train.tfrecord", [tiny.train_record(i) for i in range(NUM_RECORDS)])
  with TFRecordWriter(folder / "eval.tfrecord") as writer:
    for i in range(2):
      writer.write(serialize_eval(tiny.eval_record(i)))
  tiny.tokenizer().save(folder / "tokenizer")
  return folder


def make_config(records: Path, options: dict) -> TrainConfig:
  """The recipe of a run."""
  base = tiny.train_config()
  optim = {"steps": 5, **{key: value for key, value in options.items() if key in OPTIM}}
  rest = {key: value for key, value in options.items() if key not in OPTIM}
  buckets = tuple(tuple(b) for b in rest.pop("buckets", base.data.buckets))
  held_out = str(records / "eval.tfrecord") if rest.get("eval_every") else ""
  grpo = from_dict(GrpoConfig, TINY_GRPO | rest.pop("grpo", {}), "grpo")
  if rest.get("algorithm") == "grpo":
    optim = {"trainable": "language", **optim}
  return dataclasses.replace(
    base,
    data=dataclasses.replace(
      base.data, train=str(records / "train.tfrecord"), eval=held_out, buckets=buckets
    ),
    optim=dataclasses.replace(base.optim, **optim),
    eval=dataclasses.replace(tiny.EVAL, prompt_buckets=((256, 64),), **rest.pop("eval", {})),
    grpo=grpo,
    mesh=MeshConfig(*rest.pop("mesh", (-1, 1, 1))),
    tokenizer=str(records / "tokenizer"),
    **{"log_every": 1, "checkpoint_every": 2, **rest},
  )


def fail_at(options: dict) -> None:
  """Makes the batches of the run fail as asked."""
  whole_next, made = BatchIterator.__next__, BatchIterator.state
  signals = {
    options.pop("kill_at", None): signal.SIGKILL,
    options.pop("term_at", None): signal.SIGTERM,
  }
  poison = options.pop("poison", [])

  def failing_next(self: BatchIterator) -> Batch:
    step = made(self)["batch"] + 1
    batch = whole_next(self)
    if step in signals:
      os.kill(os.getpid(), signals[step])
    if step in poison:
      weights = np.full_like(batch.vision.pos_embed_weight, np.nan)
      batch = batch.replace(vision=batch.vision.replace(pos_embed_weight=weights))
    return batch

  BatchIterator.__next__ = failing_next


def main() -> None:
  """Runs what the command line says."""
  records, workdir, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
  for name in ("absl", "asyncio"):  # as the command does
    logging.getLogger(name).setLevel(logging.CRITICAL)
  start_processes()
  jax.config.update("jax_num_cpu_devices", options.pop("devices", 1))
  fail_at(options)
  train(make_config(records, options), workdir)


if __name__ == "__main__":
  cli.run(main)
