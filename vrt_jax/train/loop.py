"""The training loop, from records to a trained and evaluated model directory."""

import dataclasses
from pathlib import Path

import jax

from vrt_jax import model_directory
from vrt_jax.config import TrainConfig
from vrt_jax.data.buckets import bucket_of, pad_to_bucket
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.model_directory import Loaded
from vrt_jax.runtime import data_share, largest, make_mesh, put_batch, replicate, say
from vrt_jax.train import checks
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.evaluation import HeldOut, held_out_records
from vrt_jax.train.optim import learning_rate_schedule, make_optimizer, trainable_filter
from vrt_jax.train.preemption import Preempted, Preemption
from vrt_jax.train.profile import Profile
from vrt_jax.train.setup import (
  base_model,
  check_workdir,
  data_patterns,
  with_adapters,
  write_config,
)
from vrt_jax.train.sft_step import make_sft_step
from vrt_jax.train.state import Frozen, TrainState, create_state, parameter_table
from vrt_jax.train.step_clock import CompiledOnce, SkipLimit, StepClock
from vrt_jax.train.writer import open_writer
from vrt_jax.types import Batch


def train(config: TrainConfig, workdir: Path) -> dict | None:
  """Runs a recipe to its end, going on from the workdir's newest checkpoint.

  Writes what a workdir holds (README, "Files"). Returns the results of the last evaluation, None
  without held-out records. With several processes each calls it.

  Raises:
    ValueError: one line that says what is wrong with the configuration, the data or the workdir.
    FloatingPointError: more than optim.max_skipped_steps losses or gradients were not finite.
    OSError: a checkpoint could not be written.
    Preempted: SIGTERM came and the run is saved.
  """
  checks.check_numbers(config)
  check_workdir(config, workdir)
  mesh = make_mesh(config.mesh)
  train_pattern, eval_pattern = data_patterns(config, workdir)
  records = held_out_records(config, eval_pattern)
  checks.check_batch(config, mesh, len(records))
  loaded = base_model(config)
  checks.check_tokens(loaded.tokenizer)
  checks.check_buckets_hold(config, loaded.image)
  resolved = dataclasses.replace(
    config,
    model=dataclasses.replace(loaded.model.config, lora=config.model.lora),
    image=loaded.image,
  )
  batches = BatchIterator(resolved, train_pattern, loaded.tokenizer, *data_share(mesh))
  write_config(config, workdir)
  held_out = HeldOut(resolved, records, workdir, loaded, mesh)
  if config.evaluate_base:
    held_out.score(loaded, "base", "base model", reuse=True)

  optimizer = make_optimizer(config.optim)
  state, frozen = create_state(
    with_adapters(loaded, config).model,
    optimizer,
    trainable_filter(config.optim.trainable),
    mesh,
  )
  checks.check_trainable(state, frozen)
  say(parameter_table(state, frozen))
  with Checkpoints(
    workdir,
    config.checkpoint_every,
    config.keep_checkpoints,
    config.model.lora,
    config.best_metric,
  ) as checkpoints:
    state = run_steps(resolved, workdir, state, frozen, batches, checkpoints, held_out, mesh)
    if batches.drops.reasons:
      say(f"unusable training records, by reason: {dict(batches.drops.reasons)}")
    trained = held_out.model(state, frozen)
    save_model(workdir / "model", trained)
    if (best := checkpoints.best_step()) is not None:
      chosen = state if best == int(state.step) else checkpoints.restore_step(best, state).state
      save_model(workdir / "model_best", held_out.model(chosen, frozen))
      say(f"best model: step {best}, by {config.best_metric}")
  # where it was scored at its last step, that is read again
  return held_out.score(trained, "final", "trained model", reuse=config.eval_every > 0)


def run_steps(
  config: TrainConfig,
  workdir: Path,
  state: TrainState,
  frozen: Frozen,
  batches: BatchIterator,
  checkpoints: Checkpoints,
  held_out: HeldOut,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """The loop: next batch, step, log, evaluate, save; from the newest checkpoint where there is one.

  Raises:
    RuntimeError: a batch shape that was compiled before is compiled again.
    FloatingPointError, OSError, Preempted: as of `train`.
  """
  optim = config.optim
  step_fn = CompiledOnce(make_sft_step(make_optimizer(optim), optim, config.sft, state))
  schedule = learning_rate_schedule(optim)
  key = jax.random.key(config.seed)
  if (restored := checkpoints.restore(state)) is not None:
    state, key = restored.state, restored.key
    batches.restore(restored.data)
    say(f"resumed from step {int(state.step)}")
  key = replicate(key, mesh)
  first, last = int(state.step), optim.steps
  limit, clock = SkipLimit(optim.max_skipped_steps), StepClock(data_share(mesh)[1])
  with (
    open_writer(workdir, first, last) as writer,
    Preemption() as preemption,
    Profile(workdir, config.profile_step) as profile,
  ):
    for step in range(first + 1, last + 1):
      profile.before(step)
      batch = common_bucket(next(batches), config)
      state, metrics = step_fn(state, frozen, put_batch(batch, mesh), key)
      limit.check(step, metrics["skipped_steps"])
      clock.count(batch)
      scored = held_out.due(step)
      if scored or step % config.log_every == 0 or step in (1, last):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values |= {"learning_rate": float(schedule(step - 1)), "compiles": step_fn.compiles}
        values |= clock.read()
        scores = held_out.metrics(step, state, frozen) if scored else {}
        writer.write(step, values | {f"eval/{name}": value for name, value in scores.items()})
        clock.start()
      writer.advance()
      stop = preemption.reached(step)
      if stop or checkpoints.due(step) or step == last:
        checkpoints.save(state, batches.state(), key, scores if scored else {})
      if stop:
        checkpoints.wait()
        say(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on")
        raise Preempted(step)
    limit.finish()
  return state


def common_bucket(batch: Batch, config: TrainConfig) -> Batch:
  """The rows of this process, padded to the largest bucket that a process needs for this step."""
  buckets = config.data.buckets
  if len(buckets) == 1 or jax.process_count() == 1:
    return batch
  return pad_to_bucket(batch, buckets[largest(bucket_of(batch, buckets))])


def save_model(path: Path, trained: Loaded) -> None:
  """Writes a model directory."""
  model_directory.save(
    path, trained.model, trained.tokenizer, trained.image, carried=trained.carried
  )
