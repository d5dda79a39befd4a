"""The steps of reinforcement learning: prompts -> rollout -> rewards -> refills -> updates."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int32, UInt8

from vrt_jax.config import TrainConfig
from vrt_jax.cores import usable_cores
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.pipeline import BatchIterator
from vrt_jax.generate.decode import GenerationInputs
from vrt_jax.placement import batch_shardings, place, place_params, replicate
from vrt_jax.rl.groups import (
  Groups,
  advantages_of,
  equal_groups,
  joined_rewards,
  put_prompts,
  refill_source,
  reward_figures,
  score_rollout,
  special_ids,
  update_batch,
  with_advantages,
)
from vrt_jax.rl.page import write_page
from vrt_jax.rl.policy import GrpoBatch
from vrt_jax.rl.rollout import Rollout, make_rollout
from vrt_jax.rl.scoring import Reward
from vrt_jax.runtime import is_leader, with_tensor
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.evaluation import HeldOut
from vrt_jax.train.grpo_step import GAP, make_grpo_step
from vrt_jax.train.optim import make_optimizer
from vrt_jax.train.run import Run, common_bucket
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.step_clock import CompiledOnce, StepClock
from vrt_jax.types import PromptBatch, TextInputs

PAGES = "rollouts"
"""Folder of a workdir with a page for some steps."""


def grpo_steps(
  config: TrainConfig,
  workdir: Path,
  state: TrainState,
  frozen: Frozen,
  batches: BatchIterator[PromptBatch],
  checkpoints: Checkpoints,
  held_out: HeldOut,
  mesh: Mesh,
  tokenizer: ChatTokenizer,
) -> TrainState:
  """The loop, from the newest checkpoint where there is one.

  A step is an update; all updates of a rollout are made before one is logged and saved. Random
  numbers depend on the run's key, the step and the refill, so that the state and the position in
  the data are all it takes to resume.

  Raises:
    RuntimeError: a batch shape that was compiled before is compiled again.
    ValueError: a user's reward function gives no finite number.
    FloatingPointError, OSError, Preempted: as of `vrt_jax.train.loop.train`.
  """
  grpo, optim = config.grpo, config.optim
  update = CompiledOnce(make_grpo_step(make_optimizer(optim), optim, grpo, config.sft, state))
  parts = (config, workdir, state, frozen, batches, checkpoints, held_out, mesh)
  with (
    ThreadPoolExecutor(usable_cores()) as pool,
    Run(*parts, stride=grpo.updates_per_rollout) as run,
  ):
    state, key = run.state, replicate(run.key, mesh)
    sampler = Sampler(config, frozen, batches, tokenizer, pool, mesh, run.clock)
    for step in run.steps():
      first, batch = sampler.round(state, rollout_key(run.key, step, 0))
      rounds, rewards = [first], first.groups.rewards
      while sampler.wants_more(rewards, len(rounds)):
        more, fresh = sampler.round(state, rollout_key(run.key, step, len(rounds)))
        batch, rewards = sampler.refill(batch, rewards, fresh, more.groups.rewards)
        rounds.append(more)
      advantages = advantages_of(rewards, grpo)
      batch = with_advantages(batch, advantages, mesh)
      with run.clock.part("update"):
        state, metrics = jax.block_until_ready(update(state, frozen, batch, key))
        gap = metrics[GAP]  # of the policy that was sampled from
        for _ in range(grpo.updates_per_rollout - 1):
          state, metrics = jax.block_until_ready(update(state, frozen, batch, key))
      run.clock.count_tokens(sum(round.num_tokens for round in rounds))
      if run.comes(step, grpo.html_every) and is_leader():
        path = workdir / PAGES / f"step_{step}.html"
        write_page(path, f"Step {step}", first.pictures, first.groups, grpo)
      figures = reward_figures([round.groups for round in rounds], sampler.reward.names)
      figures |= advantage_figures(advantages)
      figures |= {"refills": len(rounds) - 1, "compiles": sampler.compiles + update.compiles}
      run.finish(step, state, metrics | {GAP: gap}, figures)
  return state


def rollout_key(key: Array, step: int, refill: int) -> Array:
  """The random key of one rollout."""
  return jax.random.fold_in(jax.random.fold_in(key, step), refill)


def advantage_figures(advantages: Float[np.ndarray, "B G"]) -> dict[str, float]:
  """Of the groups that the update sees."""
  return {
    "advantage/mean_abs": float(np.abs(advantages).mean()),
    "advantage/max": float(advantages.max()),
  }


@dataclass(frozen=True)
class Round:
  """The host's part of one rollout of a step."""

  pictures: UInt8[np.ndarray, "B Y X 3"]
  """Of this process's prompts."""
  groups: Groups

  @property
  def num_tokens(self) -> int:
    """Generated ids of all processes."""
    return int(self.groups.figures["length"].sum())


class Sampler:
  """Rollouts of the next prompts of the stream, with their rewards."""

  def __init__(
    self,
    config: TrainConfig,
    frozen: Frozen,
    batches: BatchIterator[PromptBatch],
    tokenizer: ChatTokenizer,
    pool: ThreadPoolExecutor,
    mesh: Mesh,
    clock: StepClock,
  ):
    grpo, ids = config.grpo, special_ids(tokenizer)
    self._grpo, self._batches = grpo, batches
    self._tokenizer, self._pool, self._mesh, self._clock = tokenizer, pool, mesh, clock
    self.reward = Reward(grpo)
    self._rollout_mesh = with_tensor(mesh, grpo.rollout_tensor)
    self._frozen = frozen.on(self._rollout_mesh).apart()
    self._roll = CompiledOnce(make_rollout(grpo, ids, self._rollout_mesh.abstract_mesh))
    self._join = CompiledOnce(join_groups, mesh=mesh)

  @property
  def compiles(self) -> int:
    """Of rollouts, and of joining them."""
    return self._roll.compiles + self._join.compiles

  def round(self, state: TrainState, key: Array) -> tuple[Round, GrpoBatch]:
    """Samples of the policy of now for the next prompts, and what an update needs of them."""
    prompts = common_bucket(next(self._batches), self._batches.buckets)
    inputs = put_prompts(prompts, self._mesh)
    with self._clock.part("rollout"):
      rollout = jax.block_until_ready(self._rollout(state.trainable, inputs, key))
    with self._clock.part("reward"):
      groups = score_rollout(
        rollout, prompts.truths, self.reward, self._tokenizer, self._pool, self._mesh
      )
    batch = update_batch(inputs, rollout, groups, self._grpo, self._mesh)
    return Round(np.asarray(prompts.grounding_image), groups), batch

  def _rollout(self, trainable: nnx.State, inputs: GenerationInputs, key: Array) -> Rollout:
    """Samples, divided over the mesh of training as the prompts are."""
    mesh = self._rollout_mesh
    trainable = place_params(trainable, mesh)
    prompts = place(inputs, batch_shardings(inputs, mesh))
    rollout = self._roll(trainable, self._frozen, prompts, replicate(key, mesh))
    return place(rollout, batch_shardings(rollout, self._mesh))

  def wants_more(self, rewards: Float[np.ndarray, "B G"], rounds: int) -> bool:
    """Whether equal groups are to be replaced by a further rollout."""
    grpo = self._grpo
    return (
      grpo.drop_equal_groups and rounds <= grpo.max_refills and bool(equal_groups(rewards).any())
    )

  def refill(
    self,
    batch: GrpoBatch,
    rewards: Float[np.ndarray, "B G"],
    fresh: GrpoBatch,
    fresh_rewards: Float[np.ndarray, "B G"],
  ) -> tuple[GrpoBatch, Float[np.ndarray, "B G"]]:
    """The batch and its rewards with groups of `fresh` in the place of equal ones."""
    source = refill_source(rewards, fresh_rewards)
    joined = self._join(batch, replicate(source, self._mesh), fresh)
    return joined, joined_rewards(rewards, source, fresh_rewards)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def join_groups(
  kept: GrpoBatch, source: Int32[Array, "B"], fresh: GrpoBatch, *, mesh: Mesh
) -> GrpoBatch:
  """`kept` with row `source[b]` of `fresh` as row b, where that is not -1."""

  def choose(old: Array, new: Array, axis: int = 0) -> Array:
    taken = jnp.take(new, jnp.maximum(source, 0), axis=axis)
    shape = [1] * old.ndim
    shape[axis] = len(source)
    return jnp.where((source >= 0).reshape(shape), taken, old)

  def choose_node(old: Any, new: Any) -> Array | TextInputs:
    if not isinstance(old, TextInputs):
      return choose(old, new)
    positions = choose(old.position_ids, new.position_ids, axis=1)
    old, new = (x.replace(position_ids=x.input_ids) for x in (old, new))
    return jax.tree.map(choose, old, new).replace(position_ids=positions)

  joined = jax.tree.map(choose_node, kept, fresh, is_leaf=lambda x: isinstance(x, TextInputs))
  return jax.lax.with_sharding_constraint(joined, batch_shardings(joined, mesh))
