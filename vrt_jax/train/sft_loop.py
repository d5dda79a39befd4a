"""The steps of supervised fine-tuning."""

from pathlib import Path

import jax

from vrt_jax.config import TrainConfig
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.placement import put_batch, replicate
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.evaluation import HeldOut
from vrt_jax.train.optim import make_optimizer
from vrt_jax.train.run import Run, common_bucket
from vrt_jax.train.sft_step import make_sft_step
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.step_clock import CompiledOnce
from vrt_jax.types import Batch


def sft_steps(
  config: TrainConfig,
  workdir: Path,
  state: TrainState,
  frozen: Frozen,
  batches: BatchIterator[Batch],
  checkpoints: Checkpoints,
  held_out: HeldOut,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """The loop: next batch, step, log, evaluate, save; from the newest checkpoint where there is one.

  Raises:
    RuntimeError: a batch shape that was compiled before is compiled again.
    FloatingPointError, OSError, Preempted: as of `vrt_jax.train.loop.train`.
  """
  optim = config.optim
  step_fn = CompiledOnce(make_sft_step(make_optimizer(optim), optim, config.sft, state))
  with Run(config, workdir, state, frozen, batches, checkpoints, held_out, mesh) as run:
    state, key = run.state, replicate(run.key, mesh)
    for step in run.steps():
      batch = common_bucket(next(batches), batches.buckets)
      state, metrics = step_fn(state, frozen, put_batch(batch, mesh), key)
      run.clock.count(batch)
      run.finish(step, state, metrics, {"compiles": step_fn.compiles})
  return state
