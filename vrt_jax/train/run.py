"""What SFT and RL share of a run: resuming, logging, evaluation, checkpoints, and when to stop."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import jax

from vrt_jax.config import TrainConfig
from vrt_jax.data.buckets import Bucket, Padded, bucket_of, pad_to_bucket
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.runtime import data_share, largest, say
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.evaluation import HeldOut
from vrt_jax.train.optim import learning_rate_schedule
from vrt_jax.train.preemption import Preempted, Preemption
from vrt_jax.train.profile import Profile
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.step_clock import SkipLimit, StepClock
from vrt_jax.train.update import Metrics
from vrt_jax.train.writer import open_writer


class Run:
  """The steps of a run, from its newest checkpoint where there is one to its last step.

      with Run(...) as run:
        for step in run.steps():
          ...
          run.finish(step, state, metrics, {})

  Args:
    config: with the resolved model and image settings.
    workdir: of the run.
    state: of step 0; `run.state` is where the run begins.
    frozen: the other parameters, for evaluation.
    batches: training data, set to the place of the checkpoint.
    checkpoints, held_out: of the workdir.
    mesh: of the run.
    stride: updates between two calls of `finish`.
  """

  def __init__(
    self,
    config: TrainConfig,
    workdir: Path,
    state: TrainState,
    frozen: Frozen,
    batches: BatchIterator,
    checkpoints: Checkpoints,
    held_out: HeldOut,
    mesh: jax.sharding.Mesh,
    stride: int = 1,
  ):
    self._config, self._batches, self._stride = config, batches, stride
    self._checkpoints, self._held_out, self._frozen = checkpoints, held_out, frozen
    self.state, self.key = state, jax.random.key(config.seed)
    if (restored := checkpoints.restore(state)) is not None:
      self.state, self.key = restored.state, restored.key
      batches.restore(restored.data)
      say(f"resumed from step {int(self.state.step)}")
    self._first, self._last = int(self.state.step), config.optim.steps
    self._schedule = learning_rate_schedule(config.optim)
    self._limit = SkipLimit(config.optim.max_skipped_steps)
    self.clock = StepClock(data_share(mesh)[1])
    self._workdir, self._stack = workdir, contextlib.ExitStack()

  def __enter__(self) -> "Run":
    enter, workdir = self._stack.enter_context, self._workdir
    self._writer = enter(open_writer(workdir, self._first, self._last))
    self._preemption = enter(Preemption())
    self._profile = enter(Profile(workdir, self._config.profile_step))
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._stack.__exit__(kind, error, traceback)

  def steps(self) -> Iterator[int]:
    """Numbers of the updates after which `finish` is called; fewer where the run stops early."""
    for step in range(self._first + self._stride, self._last + 1, self._stride):
      if self._stalled(step - self._stride):
        break
      for update in range(step - self._stride + 1, step + 1):
        self._profile.before(update)
      yield step
    self._limit.finish()

  def is_logged(self, step: int) -> bool:
    """Whether the figures of a step are written."""
    ends = step in (self._first + self._stride, self._last)
    return ends or self.comes(step, self._config.log_every) or self._held_out.due(step)

  def comes(self, step: int, every: int) -> bool:
    """Whether one of the updates since the last call of `finish` has a multiple of `every`."""
    return every > 0 and step % every < self._stride

  def finish(
    self, step: int, state: TrainState, metrics: Metrics, figures: Mapping[str, float]
  ) -> None:
    """Logs, evaluates and saves the state after a step, where it is time.

    `metrics` come from the update, `figures` from the host.

    Raises:
      FloatingPointError, OSError, Preempted: as of `vrt_jax.train.loop.train`.
    """
    self._limit.check(step, metrics["skipped_steps"])
    scores: dict[str, float] = {}
    if self.is_logged(step):
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      values |= {**figures, "learning_rate": float(self._schedule(step - 1))} | self.clock.read()
      if self._held_out.due(step):
        scores = self._held_out.metrics(step, state, self._frozen)
      self._writer.write(step, values | {f"eval/{name}": v for name, v in scores.items()})
      self.clock.start()
    for _ in range(self._stride):
      self._writer.advance()
    stop = self._preemption.reached(step)
    if stop or self._checkpoints.due(step) or step == self._last:
      self._checkpoints.save(state, self._batches.state(), self.key, scores)
    if stop:
      self._checkpoints.wait()
      say(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on")
      raise Preempted(step)

  def _stalled(self, step: int) -> bool:
    """Whether the last `early_stop` evaluations up to `step` brought no better checkpoint."""
    every = self._config.eval_every
    if not self._config.early_stop or not step or step % every:
      return False
    self._checkpoints.wait()  # so that the step's own checkpoint is among them
    best = self._checkpoints.best_step()
    if best is None or step - best < self._config.early_stop * every:
      return False
    say(f"stopped after step {step}: {self._config.best_metric} is not above that of step {best}")
    return True


def common_bucket(batch: Padded, buckets: tuple[Bucket, ...]) -> Padded:
  """The rows of this process, padded to the largest bucket that a process needs for this step."""
  if len(buckets) == 1 or jax.process_count() == 1:
    return batch
  return pad_to_bucket(batch, buckets[largest(bucket_of(batch, buckets))])
