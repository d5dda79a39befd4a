"""The training loop, from records to a trained and evaluated model directory."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from vrt_jax import evaluate, model_directory
from vrt_jax.config import TrainConfig
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.data.records import EvalRecord, read_eval_records
from vrt_jax.generate.predictor import Predictor
from vrt_jax.metrics.results import RESULTS_FILE
from vrt_jax.model_directory import Loaded
from vrt_jax.models.lora import merge_lora
from vrt_jax.runtime import make_mesh, put_batch
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.optim import learning_rate_schedule, make_optimizer, trainable_filter
from vrt_jax.train.setup import (
  base_model,
  check_workdir,
  data_patterns,
  with_adapters,
  write_config,
)
from vrt_jax.train.sft_step import make_sft_step
from vrt_jax.train.state import Frozen, TrainState, create_state, parameter_counts
from vrt_jax.train.step_clock import CompiledOnce, StepClock
from vrt_jax.train.writer import MetricWriter


def train(config: TrainConfig, workdir: Path) -> dict | None:
  """Runs a recipe to its end, going on from the workdir's newest checkpoint.

  Writes what a workdir holds (README, "Files"). Returns the results of the last evaluation, None
  without held-out records.

  Raises:
    ValueError: one line that says what is wrong with the configuration, the data or the workdir.
  """
  check_workdir(config, workdir)
  train_pattern, eval_pattern = data_patterns(config, workdir)
  records = held_out_records(config, eval_pattern)
  mesh = make_mesh(config.mesh)
  loaded = base_model(config)
  resolved = dataclasses.replace(
    config,
    model=dataclasses.replace(loaded.model.config, lora=config.model.lora),
    image=loaded.image,
  )
  batches = BatchIterator(resolved, train_pattern, loaded.tokenizer)
  write_config(config, workdir)
  if records and config.evaluate_base:
    evaluate_model(
      loaded, records, workdir / "eval" / "base", resolved, mesh, "base model", reuse=True
    )

  optimizer = make_optimizer(config.optim)
  state, frozen = create_state(
    with_adapters(loaded, config).model,
    optimizer,
    trainable_filter(config.optim.trainable),
    mesh,
  )
  print_parameters(state, frozen)
  checkpoints = Checkpoints(workdir, config.checkpoint_every, config.keep_checkpoints)
  if checkpoints.latest_step() is not None:
    state, data_state = checkpoints.restore(state)
    batches.restore(data_state)
    print(f"resumed from step {int(state.step)}")
  step_fn = CompiledOnce(make_sft_step(optimizer, config.optim, config.sft, state))
  state = run_steps(resolved, workdir, step_fn, state, frozen, batches, checkpoints, mesh)
  checkpoints.close()
  if batches.drops.reasons:
    print(f"unusable training records, by reason: {dict(batches.drops.reasons)}")

  trained = dataclasses.replace(loaded, model=merge_lora(frozen.merge(state.trainable)))
  model_directory.save(
    workdir / "model",
    trained.model,
    trained.tokenizer,
    trained.image,
    carried=trained.carried,
  )
  if not records:
    return None
  return evaluate_model(
    trained, records, workdir / "eval" / "final", resolved, mesh, "trained model"
  )


def run_steps(
  config: TrainConfig,
  workdir: Path,
  step_fn: CompiledOnce,
  state: TrainState,
  frozen: Frozen,
  batches: BatchIterator,
  checkpoints: Checkpoints,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """The loop: next batch, step, log, save.

  Raises:
    RuntimeError: a batch shape that was compiled before is compiled again.
    FloatingPointError: the loss is not finite.
  """
  schedule = learning_rate_schedule(config.optim)
  key = jax.random.key(config.seed)
  first, last = int(state.step), config.optim.steps
  with MetricWriter(workdir, first, last) as writer:
    clock = StepClock()
    for step in range(first + 1, last + 1):
      batch = next(batches)
      state, metrics = step_fn(state, frozen, put_batch(batch, mesh), key)
      clock.count(batch)
      if step % config.log_every == 0 or step in (first + 1, last):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite(values["loss"]):
          raise FloatingPointError(f"the loss of step {step} is {values['loss']}")
        rates = {"learning_rate": float(schedule(step - 1)), "compiles": step_fn.compiles}
        writer.write(step, values | rates | clock.read())
      writer.advance()
      if checkpoints.due(step) or step == last:
        checkpoints.save(state, batches.state())
  return state


def held_out_records(config: TrainConfig, pattern: str) -> list[EvalRecord]:
  """The first eval.num_samples records (0: all); none without a pattern."""
  if not pattern:
    return []
  records = list(read_eval_records(pattern))
  return records[: config.eval.num_samples or None]


def evaluate_model(
  loaded: Loaded,
  records: list[EvalRecord],
  out_dir: Path,
  config: TrainConfig,
  mesh: jax.sharding.Mesh,
  name: str,
  reuse: bool = False,
) -> dict:
  """Scores a model on the held-out records and prints the headline.

  With `reuse`, results that `out_dir` already has are read instead (a resumed run's base model).
  """
  results_file = out_dir / RESULTS_FILE
  if reuse and results_file.is_file():
    results = json.loads(results_file.read_text())
  else:
    predictor = Predictor(
      loaded, config.eval, thinking=config.data.thinking, blind=config.data.blind, mesh=mesh
    )
    results = evaluate.evaluate(
      predictor,
      records,
      out_dir,
      config.eval,
      thinking=config.data.thinking,
      config_hash=config_hash(config),
      description=name,
    )
  print(f"{name}: {evaluate.headline(results)}  ({len(records)} held-out samples)")
  return results


def config_hash(config: TrainConfig) -> str:
  """Short hash of a resolved configuration."""
  text = json.dumps(dataclasses.asdict(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def print_parameters(state: TrainState, frozen: Frozen) -> None:
  """The table of trainable and frozen parameters."""
  counts = parameter_counts(state, frozen)
  print(f"{'module':<36}{'trainable':>14}{'frozen':>14}")
  for name, (trainable, fixed) in counts.items():
    print(f"{name:<36}{trainable:>14,}{fixed:>14,}")
