"""The GRPO update: objective, accumulation, direction, divergence, skipped steps, one compile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.rl import group_case as case
from vrt_jax.config import GrpoConfig, OptimConfig, SftLossConfig
from vrt_jax.rl.policy import GrpoBatch, policy_logps, policy_temperature
from vrt_jax.train.grpo_step import grpo_gradients, make_grpo_step, masks_that_count
from vrt_jax.train.optim import make_optimizer
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.update import Metrics

KEY = jax.random.key(0)
LOSSES = SftLossConfig(num_points=64)
NO_MASKS = dataclasses.replace(case.GRPO, mask_loss="off")
WITH_KL = dataclasses.replace(NO_MASKS, updates_per_rollout=2, kl_weight=0.5)
TEMPERED = dataclasses.replace(WITH_KL, temperature=0.6, tempered=True)


@functools.cache
def step_function():
  """The one compiled step of these tests, with mask losses."""
  like = case.state()[0]
  return make_grpo_step(make_optimizer(case.OPTIM), case.OPTIM, case.GRPO, LOSSES, like)


@functools.cache
def gradients(grpo: GrpoConfig, optim: OptimConfig = case.OPTIM):
  """Compiled gradients."""
  return jax.jit(functools.partial(grpo_gradients, optim=optim, grpo=grpo, losses=LOSSES))


def step(state: TrainState, frozen: Frozen, batch: GrpoBatch) -> tuple[TrainState, dict]:
  state, metrics = step_function()(state, frozen, case.on_device(batch), KEY)
  return state, {name: float(value) for name, value in metrics.items()}


@functools.partial(jax.jit, static_argnames="temperature")
def logps_of(
  trainable: nnx.State, frozen: Frozen, batch: GrpoBatch, temperature: float = 1.0
) -> jax.Array:
  return policy_logps(frozen.merge(trainable), batch, temperature)


def own_logps(batch: GrpoBatch, temperature: float = 1.0) -> GrpoBatch:
  """The batch with the log-probabilities of the state as it starts."""
  state, frozen = case.state()
  logps = logps_of(state.trainable, frozen, case.on_device(batch), temperature)
  return batch.replace(completions=batch.completions.replace(logps=np.asarray(logps)))


def values(state: nnx.State) -> dict[tuple, np.ndarray]:
  return {path: np.array(v.get_value()) for path, v in nnx.to_flat_state(state)}


def test_metrics_are_the_weighted_parts():
  batch = own_logps(case.random_batch())
  state, frozen = case.state()
  before, fixed = values(state.trainable), values(frozen.params)
  state, metrics = step(state, frozen, batch)
  parts = metrics["loss/policy"] + 2.0 * metrics["loss/mask_bce"] + 0.5 * metrics["loss/mask_dice"]
  assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
  # the ratio is 1: the mean over samples of -advantage, with the mean credit of its tokens
  mask = np.asarray(batch.completions.token_mask)
  credit = (batch.credit * mask).sum(-1) / mask.sum(-1)
  assert metrics["loss/policy"] == pytest.approx(-(batch.advantages + credit).mean(), rel=1e-4)
  assert 0.1 < metrics["loss/mask_bce"] < 20 and 0 < metrics["loss/mask_dice"] <= 1
  assert metrics["kl"] == metrics["clip_share"] == metrics["skipped_steps"] == 0
  assert metrics["rollout/logprob_gap"] < 1e-5
  assert metrics["grad_norm"] > 0
  after = values(state.trainable)
  assert all(not np.array_equal(after[path], before[path]) for path in before)
  assert {p[0] for p in before} == {"qwen", "text_hidden_fcs"}
  for path, value in values(frozen.params).items():
    np.testing.assert_array_equal(value, fixed[path])


def test_the_gap_is_the_largest_over_all_parts():
  batch = own_logps(case.random_batch())
  logps = batch.completions.logps.copy()
  logps[2, 1, 0] -= 0.75
  batch = batch.replace(completions=batch.completions.replace(logps=logps))
  parts = dataclasses.replace(case.OPTIM, accumulation_steps=4)
  state, frozen = case.state()
  _, metrics = gradients(NO_MASKS, parts)(state, frozen, case.on_device(batch), KEY)
  assert float(metrics["rollout/logprob_gap"]) == pytest.approx(0.75, abs=1e-4)


def test_a_praised_sample_becomes_likelier_and_a_blamed_one_less_likely():
  batch = case.random_batch()
  advantages = np.zeros_like(batch.advantages)
  advantages[0, 0], advantages[1, 2] = 1.0, -1.0
  batch = batch.replace(
    advantages=advantages, credit=np.zeros_like(batch.credit), best_valid=np.zeros(4, bool)
  )
  state, frozen = case.state()
  on_device = case.on_device(batch)
  before = np.asarray(logps_of(state.trainable, frozen, on_device)).sum(-1)
  for _ in range(3):
    state, metrics = step(state, frozen, batch)
    assert metrics["loss/mask_bce"] == metrics["loss/mask_dice"] == 0
  change = np.asarray(logps_of(state.trainable, frozen, on_device)).sum(-1) - before
  assert change[0, 0] > 0.5 and change[1, 2] < -0.5
  assert step_function()._cache_size() == 1


def test_four_parts_equal_one_part():
  """Without mask losses, whose points are drawn anew in every part."""
  batch = case.on_device(case.random_batch())
  assert len(set(np.asarray(batch.completions.lengths).flatten().tolist())) > 2
  parts = dataclasses.replace(case.OPTIM, accumulation_steps=4)
  state, frozen = case.state()
  one, one_metrics = gradients(NO_MASKS)(state, frozen, batch, KEY)
  four, four_metrics = gradients(NO_MASKS, parts)(state, frozen, batch, KEY)
  for name in one_metrics:
    np.testing.assert_allclose(four_metrics[name], one_metrics[name], rtol=1e-4, err_msg=name)
  largest = max(np.abs(v).max() for v in values(one).values())
  assert largest > 0
  for path, value in values(one).items():
    np.testing.assert_allclose(values(four)[path], value, rtol=1e-4, atol=1e-5 * largest)


def numpy_metrics(logps: np.ndarray, reference: np.ndarray, batch: GrpoBatch) -> dict[str, float]:
  """Policy loss, divergence and clipped share, sample by sample, in float64."""
  c, loss, kl, clipped, tokens = batch.completions, [], [], 0, 0
  for row in range(logps.shape[0]):
    for g in range(logps.shape[1]):
      n = int(c.lengths[row, g])
      a = np.float64(batch.advantages[row, g]) + batch.credit[row, g, :n]
      new, old, ref = (np.float64(x[row, g, :n]) for x in (logps, c.logps, reference))
      ratio = np.exp(new - old)
      free, bounded = ratio * a, np.clip(ratio, 0.8, 1.2) * a
      loss.append(-np.minimum(free, bounded).mean())
      kl.append((np.exp(ref - new) - (ref - new) - 1).mean())
      clipped, tokens = clipped + (bounded < free).sum(), tokens + n
  return {"loss/policy": np.mean(loss), "kl": np.mean(kl), "clip_share": clipped / tokens}


def adapters_off(trainable: nnx.State) -> nnx.State:
  """LoRA's B at zero."""
  flat = [
    (path, v.replace(jnp.zeros_like(v.get_value())) if path[-1] == "lora_b" else v)
    for path, v in nnx.to_flat_state(trainable)
  ]
  return nnx.from_flat_state(flat)


def run_with_kl(
  trainable: nnx.State | None, batch: GrpoBatch, grpo: GrpoConfig = WITH_KL
) -> Metrics:
  state, frozen = case.state()
  state = state.replace(trainable=state.trainable if trainable is None else trainable)
  return gradients(grpo)(state, frozen, case.on_device(batch), KEY)[1]


@pytest.mark.parametrize("grpo", [WITH_KL, TEMPERED], ids=["plain", "tempered"])
def test_objective_with_old_policy_and_reference(grpo: GrpoConfig):
  rng = np.random.default_rng(5)
  batch = own_logps(case.random_batch(), policy_temperature(grpo))
  moved = batch.completions.logps + rng.uniform(-0.5, 0.5, batch.completions.logps.shape)
  moved = np.where(batch.completions.logps < 0, moved, 0.0).astype(np.float32)
  now = batch.completions.logps
  batch = batch.replace(completions=batch.completions.replace(logps=moved))
  state, frozen = case.state()
  start = logps_of(
    adapters_off(state.trainable), frozen, case.on_device(batch), policy_temperature(grpo)
  )
  metrics = run_with_kl(None, batch, grpo)
  wanted = numpy_metrics(now, np.asarray(start), batch)
  for name, value in wanted.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-3), name
    assert abs(value) > 0.01, name
  total = wanted["loss/policy"] + 0.5 * wanted["kl"]
  assert float(metrics["loss"]) == pytest.approx(total, rel=1e-3)


def test_without_adapters_the_divergence_is_zero():
  state, _ = case.state()
  metrics = run_with_kl(adapters_off(state.trainable), case.random_batch())
  assert abs(float(metrics["kl"])) < 1e-9


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
  state, frozen = case.state()
  before = values(state.trainable)
  broken = case.random_batch().replace(advantages=np.full((4, 3), np.nan, np.float32))
  state, metrics = step(state, frozen, broken)
  assert (metrics["skipped_steps"], int(state.step)) == (1, 1)
  for path, value in values(state.trainable).items():
    np.testing.assert_array_equal(value, before[path])


def test_masks_that_count():
  batch = case.random_batch()
  slots = np.full_like(batch.completions.seg_slots, -1)
  slots[:, :, 0] = 0
  slots[1] = -1
  answer = np.zeros_like(batch.best_is_answer)
  answer[[0, 3], 0] = True
  batch = case.on_device(
    batch.replace(completions=batch.completions.replace(seg_slots=slots), best_is_answer=answer)
  )
  assert masks_that_count(batch, case.GRPO).tolist() == [True, False, False, False]
  reference = dataclasses.replace(case.GRPO, mask_loss="reference")
  assert masks_that_count(batch, reference).tolist() == [True, False, True, False]


def test_training_everything_is_refused():
  optim = dataclasses.replace(case.OPTIM, trainable="all")
  with pytest.raises(ValueError, match='"language" or "adapters"'):
    make_grpo_step(make_optimizer(optim), optim, case.GRPO, LOSSES, None)


def test_long_groups_are_computed_again_wholly():
  """The length is that of the prompt and of all completions, which stand one after the other."""
  (state, frozen), batch = case.state(), case.on_device(case.random_batch(2))
  tokens = batch.prompts.input_ids.shape[1] + batch.completions.tokens[0].size

  def program(remat: str, full_remat_tokens: int) -> str:
    optim = dataclasses.replace(case.OPTIM, remat=remat, full_remat_tokens=full_remat_tokens)
    return gradients(NO_MASKS, optim).lower(state, frozen, batch, KEY).as_text()

  linears, full = program("linears", 0), program("full", 0)
  assert linears != full
  assert program("linears", tokens + 1) == linears
  assert program("linears", tokens) == full
