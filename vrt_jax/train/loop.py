"""The training loop, from records to a trained and evaluated model directory."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

from vrt_jax import model_directory
from vrt_jax.config import TrainConfig
from vrt_jax.data.pipeline import SFT, BatchIterator, Task
from vrt_jax.data.prompts import PROMPTS
from vrt_jax.files import sole_writer
from vrt_jax.model_directory import Loaded
from vrt_jax.runtime import data_share, is_leader, make_mesh, say
from vrt_jax.train import checks
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.evaluation import HeldOut, held_out_records
from vrt_jax.train.grpo_loop import grpo_steps
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.setup import (
  base_model,
  check_workdir,
  data_patterns,
  with_adapters,
  write_config,
)
from vrt_jax.train.sft_loop import sft_steps
from vrt_jax.train.state import create_state, parameter_table


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
  if config.algorithm == "grpo":
    checks.check_grpo(config)
  check_workdir(config, workdir)
  if config.base:
    model_directory.resolve(config.base)  # a wrong path is said before the data are made
  with sole_writer(workdir) if is_leader() else nullcontext():
    return _train(config, workdir)


def _train(config: TrainConfig, workdir: Path) -> dict | None:
  mesh = make_mesh(config.mesh)
  train_pattern, eval_pattern = data_patterns(config, workdir)
  records = held_out_records(config, eval_pattern)
  checks.check_batch(config, mesh, len(records))
  loaded = base_model(config, mesh)
  resolved = resolve(config, loaded)
  task: Task = PROMPTS if config.algorithm == "grpo" else SFT
  batches = BatchIterator(resolved, train_pattern, loaded.tokenizer, task, *data_share(mesh))
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
    parts = (resolved, workdir, state, frozen, batches, checkpoints, held_out, mesh)
    if config.algorithm == "grpo":
      state = grpo_steps(*parts, loaded.tokenizer)
    else:
      state = sft_steps(*parts)
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


def resolve(config: TrainConfig, loaded: Loaded) -> TrainConfig:
  """The recipe with the sizes of the model that it starts from.

  Raises:
    ValueError: tokenizer or buckets do not fit the model.
  """
  checks.check_tokens(loaded.tokenizer)
  checks.check_buckets_hold(config, loaded.image)
  model = dataclasses.replace(loaded.model.config, lora=config.model.lora)
  return dataclasses.replace(config, model=model, image=loaded.image)


def save_model(path: Path, trained: Loaded) -> None:
  """Writes a model directory."""
  model_directory.save(
    path, trained.model, trained.tokenizer, trained.image, carried=trained.carried
  )
