"""The SFT step: one compilation, a falling loss, frozen parameters, accumulation, exact resume."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from vrt_jax.config import MeshConfig, SftLossConfig, TrainConfig
from vrt_jax.data.pipeline import SFT, BatchIterator
from vrt_jax.placement import put_batch
from vrt_jax.runtime import make_mesh
from vrt_jax.train.checkpoint import Checkpoints
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.sft_step import make_sft_step, sft_gradients
from vrt_jax.train.state import Frozen, TrainState, create_state
from vrt_jax.train.update import keep_if_finite, split_batch
from vrt_jax.types import Batch

CONFIG = tiny.train_config()
KEY = jax.random.key(0)


@functools.cache
def mesh() -> jax.sharding.Mesh:
  return make_mesh(MeshConfig())


def fresh(config: TrainConfig = CONFIG) -> tuple[TrainState, Frozen]:
  """A new state of the same random model: the step donates its arrays."""
  optimizer = make_optimizer(config.optim)
  return create_state(
    tiny.random_model(config.model), optimizer, trainable_filter(config.optim.trainable), mesh()
  )


@functools.cache
def step_function():
  """The one compiled step of these tests."""
  return make_sft_step(make_optimizer(CONFIG.optim), CONFIG.optim, CONFIG.sft, fresh()[0])


def values(state: nnx.State) -> dict[tuple, np.ndarray]:
  return {path: np.array(v.get_value()) for path, v in nnx.to_flat_state(state)}


def train(state: TrainState, frozen: Frozen, batches: list[Batch]) -> tuple[TrainState, list[dict]]:
  history = []
  for batch in batches:
    state, metrics = step_function()(state, frozen, put_batch(batch, mesh()), KEY)
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


def test_loss_falls_on_one_batch_with_one_compilation_and_frozen_parameters_stay():
  state, frozen = fresh()
  before, fixed = values(state.trainable), values(frozen.params)
  state, history = train(state, frozen, [tiny.batch()] * 30)
  assert step_function()._cache_size() == 1
  assert int(state.step) == 30
  for name in ("loss", "loss/text", "loss/mask_bce"):
    assert history[-1][name] < 0.9 * history[0][name], name
  assert all(np.isfinite(list(metrics.values())).all() for metrics in history)
  after = values(state.trainable)
  for path, value in values(frozen.params).items():
    np.testing.assert_array_equal(value, fixed[path])
  assert all(not np.array_equal(after[path], before[path]) for path in before)


def test_only_adapters_and_the_two_heads_train_and_have_optimizer_state():
  state, frozen = fresh()
  trained, fixed = set(values(state.trainable)), set(values(frozen.params))
  assert not trained & fixed
  for path in trained:
    assert (
      path[-1] in ("lora_a", "lora_b")
      or path[0] == "text_hidden_fcs"
      or path[:2] == ("sam2", "mask_decoder")
    ), path
  for path in fixed:
    assert path[-1] not in ("lora_a", "lora_b")
    assert path[0] != "text_hidden_fcs"
    assert path[:2] != ("sam2", "mask_decoder")
  count = sum(v.size for v in values(state.trainable).values())
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert moments == 2 * count


def test_metrics_are_the_weighted_parts():
  state, frozen = fresh()
  _, (metrics,) = train(state, frozen, [tiny.batch()])
  parts = metrics["loss/text"] + 2.0 * metrics["loss/mask_bce"] + 0.5 * metrics["loss/mask_dice"]
  assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
  assert metrics["tokens"] == tiny.batch().text.token_mask.sum()
  assert metrics["grad_norm"] > 0
  assert 4 < metrics["loss/text"] < 60  # random weights; log(512) = 6.2 is the uniform guess


def test_split_batch_keeps_samples_together():
  batch = tiny.batch(4)
  parts = split_batch(jax.tree.map(jnp.asarray, batch), 2)
  for part in range(2):
    rows = slice(part, None, 2)
    np.testing.assert_array_equal(parts.text.input_ids[part], batch.text.input_ids[rows])
    np.testing.assert_array_equal(parts.text.position_ids[part], batch.text.position_ids[:, rows])
    np.testing.assert_array_equal(parts.targets.masks[part], batch.targets.masks[rows])
    np.testing.assert_array_equal(parts.vision.pixel_values[part], batch.vision.pixel_values[rows])


def test_two_parts_equal_one_part():
  """Text loss alone: the points of the mask losses are drawn anew in every part."""
  loss = SftLossConfig(bce_weight=0.0, dice_weight=0.0, num_points=16)
  state, frozen = fresh()
  lengths = tiny.batch().text.token_mask.sum(1)
  assert lengths[0] != lengths[1]  # a mean of the parts' means would differ
  results = []
  for parts in (1, 2):
    optim = dataclasses.replace(CONFIG.optim, accumulation_steps=parts)
    run = jax.jit(functools.partial(sft_gradients, optim=optim, loss=loss))
    results.append(run(state, frozen, jax.tree.map(jnp.asarray, tiny.batch()), KEY))
  (one, one_metrics), (two, two_metrics) = results
  for name in ("loss", "loss/text"):
    np.testing.assert_allclose(two_metrics[name], one_metrics[name], rtol=1e-5)
  np.testing.assert_allclose(two_metrics["loss/mask_bce"], one_metrics["loss/mask_bce"], rtol=0.5)
  largest = max(np.abs(v).max() for v in values(one).values())
  assert largest > 0
  for path, value in values(one).items():
    np.testing.assert_allclose(values(two)[path], value, rtol=1e-4, atol=1e-5 * largest)


def test_long_sequences_alone_are_computed_again_wholly():
  state, frozen = fresh()
  batch = jax.tree.map(jnp.asarray, tiny.batch())
  tokens = batch.text.input_ids.shape[1]

  def program(remat: str, full_remat_tokens: int) -> str:
    optim = dataclasses.replace(CONFIG.optim, remat=remat, full_remat_tokens=full_remat_tokens)
    run = functools.partial(sft_gradients, optim=optim, loss=CONFIG.sft)
    return jax.jit(run).lower(state, frozen, batch, KEY).as_text()

  linears, full = program("linears", 0), program("full", 0)
  assert linears != full
  assert program("linears", tokens + 1) == linears
  assert program("linears", tokens) == full


def poisoned(batch: Batch) -> Batch:
  weights = np.full_like(batch.vision.pos_embed_weight, np.nan)
  return batch.replace(vision=batch.vision.replace(pos_embed_weight=weights))


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
  state, frozen = fresh()
  state, _ = train(state, frozen, [tiny.batch()])
  before = jax.device_get(state)
  state, (metrics,) = train(state, frozen, [poisoned(tiny.batch())])
  assert not np.isfinite(metrics["loss"])
  assert metrics["skipped_steps"] == 1
  assert (int(state.step), int(state.skipped)) == (2, 1)
  jax.tree.map(np.testing.assert_array_equal, state.trainable, before.trainable)
  adam, _, schedule = state.opt_state[1]
  jax.tree.map(np.testing.assert_array_equal, adam, before.opt_state[1][0])
  assert int(schedule.count) == 2  # the learning rate of step 3 comes next
  state, (metrics,) = train(state, frozen, [tiny.batch()])
  assert np.isfinite(metrics["loss"])
  assert metrics["skipped_steps"] == 1
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.trainable, before.trainable)
  assert all(jax.tree.leaves(changed))
  assert step_function()._cache_size() == 1


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped():
  state, _ = fresh()
  new = state.replace(
    step=state.step + 1, trainable=jax.tree.map(lambda x: x * jnp.nan, state.trainable)
  )
  kept = keep_if_finite(jnp.isfinite(1.0) & jnp.isfinite(jnp.inf), new, state)
  jax.tree.map(np.testing.assert_array_equal, kept.trainable, state.trainable)
  assert (int(kept.step), int(kept.skipped)) == (1, 1)
  taken = keep_if_finite(jnp.isfinite(1.0), new, state)
  assert all(np.isnan(x).all() for x in jax.tree.leaves(taken.trainable))
  assert int(taken.skipped) == 0


def test_resume_equals_straight_bit_for_bit(tmp_path: Path):
  pattern = tiny.write_train(tmp_path / "train.tfrecord", [tiny.train_record(i) for i in range(6)])

  def stream() -> BatchIterator:
    return BatchIterator(CONFIG, pattern, tiny.tokenizer(), SFT)

  state, frozen = fresh()
  batches = stream()
  straight, history = train(state, frozen, [next(batches) for _ in range(4)])

  state, frozen = fresh()
  batches = stream()
  state, first = train(state, frozen, [next(batches) for _ in range(2)])
  with Checkpoints(tmp_path, every=1, keep=1, lora=tiny.LORA) as checkpoints:
    checkpoints.save(state, batches.state(), KEY)

  state, frozen = fresh()
  batches = stream()
  with Checkpoints(tmp_path, every=1, keep=1, lora=tiny.LORA) as checkpoints:
    restored = checkpoints.restore(state)
  state = restored.state
  batches.restore(restored.data)
  assert int(state.step) == 2
  resumed, second = train(state, frozen, [next(batches) for _ in range(2)])
  assert first + second == history
  jax.tree.map(np.testing.assert_array_equal, resumed, straight)
  assert step_function()._cache_size() == 1
