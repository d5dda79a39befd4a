"""Log-probabilities of completions and their [SEG] states against the rollout and full forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.rl import group_case as case
from vrt_jax.generate.decode import GenerationInputs
from vrt_jax.ops import group_attention
from vrt_jax.rl.policy import best_sample, completion_logps, completion_states, seg_states
from vrt_jax.rl.rollout import Rollout, decode_group_masks, make_rollout
from vrt_jax.train.state import Frozen
from vrt_jax.types import VisualFeatures

IDS = case.few_ids()
GAP = 1e-4


@functools.cache
def rolled(dtype: str) -> Rollout:
  state, frozen = case.state(dtype)
  return make_rollout(case.GRPO, IDS)(state.trainable, frozen, case.inputs(), jax.random.key(5))


@functools.partial(jax.jit, static_argnames="remat")
def policy(
  trainable: nnx.State,
  frozen: Frozen,
  prompts: GenerationInputs,
  visual: VisualFeatures,
  out: Rollout,
  remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
  """(log-probabilities, masks) of the completions of `out`, by an update's functions."""
  model = frozen.merge(trainable)
  states = completion_states(
    model, prompts.text, prompts.rope_deltas, visual, out.completions.tokens, remat=remat
  )
  hidden = seg_states(states.own, out.completions.seg_slots)
  masks = decode_group_masks(model, out.image, hidden)
  return completion_logps(model, states, out.completions), masks


def gap(dtype: str = "float32", **changes: object) -> float:
  """Largest difference of log-probabilities; `changes` replace parts of the prompts."""
  state, frozen = case.state(dtype)
  out = rolled(dtype)
  visual = changes.pop("visual", out.visual)
  prompts = jax.tree.map(jnp.asarray, case.inputs().replace(**changes))
  logps, _ = policy(state.trainable, frozen, prompts, visual, out)
  return float(np.abs(logps - out.completions.logps).max())


def test_the_policy_gives_the_rollouts_log_probabilities():
  assert gap() < GAP
  assert np.asarray(rolled("float32").completions.logps).min() < -4
  assert policy._cache_size() == 1


def test_the_gap_shows_what_is_wrong():
  """Positions off by one, no DeepStack, other visual tokens."""
  inputs, visual = case.inputs(), rolled("float32").visual
  assert gap(rope_deltas=inputs.rope_deltas + 1) > 10 * GAP
  assert gap(visual=visual.replace(deepstack=jnp.zeros_like(visual.deepstack))) > 10 * GAP
  assert gap(visual=visual.replace(tokens=visual.tokens[::-1])) > 10 * GAP


def test_in_bfloat16_the_gap_stays_small():
  """Both sides round in the same places, so the gap is far below bfloat16's own error of 0.01."""
  assert gap("bfloat16") < 2e-3


def test_a_tempered_policy_has_its_logits_over_the_temperature():
  state, frozen = case.state()
  tempered = dataclasses.replace(case.GRPO, temperature=0.5, tempered=True)
  out = make_rollout(tempered, IDS)(state.trainable, frozen, case.inputs(), jax.random.key(5))
  model = frozen.merge(state.trainable)
  inputs = jax.tree.map(jnp.asarray, case.inputs())
  states = completion_states(
    model, inputs.text, inputs.rope_deltas, out.visual, out.completions.tokens
  )
  language = model.qwen.language_model
  logits = language.final_norm(states.before) @ language.head_weight().T

  def gap_at(temperature: float) -> float:
    every = jax.nn.log_softmax(logits / temperature, axis=-1)
    logps = jnp.take_along_axis(every, out.completions.tokens[..., None], axis=-1)[..., 0]
    logps = jnp.where(out.completions.token_mask, logps, 0.0)
    own = completion_logps(model, states, out.completions, temperature)
    np.testing.assert_allclose(own, logps, atol=GAP)
    return float(np.abs(out.completions.logps - logps).max())

  assert gap_at(0.5) < GAP
  assert gap_at(1.0) > 0.1


def test_seg_states_prompt_the_rollouts_masks():
  state, frozen = case.state()
  out = rolled("float32")
  inputs = jax.tree.map(jnp.asarray, case.inputs())
  _, masks = policy(state.trainable, frozen, inputs, out.visual, out)
  used = np.asarray(out.completions.seg_slots) >= 0
  assert used.sum() >= 4
  np.testing.assert_allclose(
    np.asarray(masks)[used], np.asarray(out.low_res_masks)[used], rtol=1e-4, atol=1e-4
  )


def test_one_sample_does_not_see_another():
  state, frozen = case.state()
  out = rolled("float32")
  inputs = jax.tree.map(jnp.asarray, case.inputs())
  before, _ = policy(state.trainable, frozen, inputs, out.visual, out)
  tokens = out.completions.tokens.at[:, 1, 0].add(1)
  other = out.replace(completions=out.completions.replace(tokens=tokens))
  after, _ = policy(state.trainable, frozen, inputs, out.visual, other)
  np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
  assert (np.asarray(after != before)[:, 1]).any()


@pytest.mark.parametrize("remat", ["linears", "full"])
def test_remat_and_chunks_change_no_gradient(monkeypatch: pytest.MonkeyPatch, remat: str):
  state, frozen = case.state()
  out = rolled("float32")

  def gradient(remat: str) -> nnx.State:
    def loss(trainable: nnx.State) -> jax.Array:
      return jnp.sum(policy(trainable, frozen, case.inputs(), out.visual, out, remat)[0])

    return jax.grad(loss)(state.trainable)

  wanted = gradient("none")
  monkeypatch.setattr(group_attention, "MAX_UNCHUNKED", 0)
  monkeypatch.setattr(group_attention, "QUERY_CHUNK", 9)  # 3 queries of each sample at a time
  found = gradient(remat)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
  assert largest > 0
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)


def test_best_sample():
  x = jnp.arange(12).reshape(2, 3, 2)
  assert best_sample(x, jnp.asarray([2, 0])).tolist() == [[4, 5], [6, 7]]
