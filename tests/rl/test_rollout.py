"""Group rollout against `generate`, against samples with their own prompt, and full forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.rl import group_case as case
from vrt_jax.generate.decode import (
  DecodeState,
  GenerationInputs,
  TokenStats,
  decode,
  last_states,
  read_prompts,
  row_keys,
  start_groups,
)
from vrt_jax.generate.generation import generate
from vrt_jax.generate.sampling import Sampling
from vrt_jax.models.sa2va import Sa2VA, gather_positions
from vrt_jax.models.sam2.model import Sam2
from vrt_jax.rl.rollout import Rollout, make_rollout, seg_slots

G, N, M = case.GRPO.group_size, case.GRPO.max_new_tokens, case.GRPO.max_masks
IDS = case.few_ids()
SEED = 6
KEY = jax.random.key(SEED)


@functools.cache
def rollout_function():
  """The compiled rollout of these tests."""
  return make_rollout(case.GRPO, IDS)


@functools.cache
def sampled(seed: int = SEED) -> Rollout:
  state, frozen = case.state()
  out = rollout_function()(state.trainable, frozen, case.inputs(), jax.random.key(seed))
  return jax.device_get(out)


@functools.cache
def split_model() -> tuple[nnx.GraphDef, nnx.State]:
  state, frozen = case.state()
  return nnx.split(frozen.merge(state.trainable))


def test_greedy_samples_are_what_generate_says():
  grpo = dataclasses.replace(case.GRPO, temperature=0.0, top_p=1.0)
  state, frozen = case.state()
  out = make_rollout(grpo, case.ids())(state.trainable, frozen, case.inputs(), KEY)
  one = generate(
    *split_model(),
    case.inputs(),
    KEY,
    max_new_tokens=N,
    max_masks=M,
    sampling=Sampling(),
    ids=case.ids(),
  )
  for g in range(G):
    np.testing.assert_array_equal(out.completions.tokens[:, g], one.tokens)
    np.testing.assert_array_equal(out.completions.lengths[:, g], one.lengths)
  assert (one.tokens[0] != one.tokens[1]).any()


def copied(inputs: GenerationInputs) -> GenerationInputs:
  """Every prompt G times."""
  positions = np.repeat(inputs.text.position_ids, G, axis=1)
  rest = jax.tree.map(lambda x: np.repeat(x, G, axis=0), inputs)
  return rest.replace(text=rest.text.replace(position_ids=positions))


def decode_rows(params: nnx.State, inputs: GenerationInputs, keys: jax.Array) -> DecodeState:
  """Samples [B, G] of the given keys, with the sampling of these tests."""
  model = nnx.merge(split_model()[0], params)
  visual = model.qwen.visual_features(inputs.vision)
  cache, hidden = read_prompts(model, inputs.text, visual)
  state = start_groups(cache, inputs, keys, hidden.shape[-1], N, M, IDS.pad)
  state = state.replace(stats=TokenStats(jnp.zeros((*keys.shape, N)), jnp.zeros(keys.shape)))
  logits = model.qwen.language_model.logits(last_states(hidden, inputs.text.token_mask))
  sampling = Sampling(case.GRPO.temperature, case.GRPO.top_p)
  return decode(model, state, logits, sampling, IDS)


def test_a_group_equals_samples_that_each_have_their_prompt():
  keys = row_keys(KEY, 2, G).reshape(2 * G, 1)
  alone = jax.jit(decode_rows)(split_model()[1], copied(case.inputs()), keys)
  found = sampled().completions
  np.testing.assert_array_equal(found.tokens.reshape(-1, N), alone.tokens[:, 0])
  np.testing.assert_allclose(found.logps.reshape(-1, N), alone.stats.logps[:, 0], atol=1e-4)
  assert len({tuple(row) for row in found.tokens.reshape(-1, N).tolist()}) == 2 * G


def shapes_of(jaxpr: jax.extend.core.Jaxpr) -> set[tuple[int, ...]]:
  found = {tuple(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars}
  for eqn in jaxpr.eqns:
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      found |= shapes_of(inner)
  return found


def holds_copied_prompts(shapes: set[tuple[int, ...]]) -> bool:
  """Whether keys of all prompt slots are there for every sample of a group."""
  width = case.MODEL.text.head_dim
  count = 2 * G * case.PROMPT_SLOTS * case.MODEL.text.num_kv_heads * width
  return any(case.PROMPT_SLOTS in s and s[-1] == width and np.prod(s) % count == 0 for s in shapes)


def test_no_array_holds_a_prompt_for_every_sample():
  state, frozen = case.state()
  traced = jax.make_jaxpr(rollout_function())(state.trainable, frozen, case.inputs(), KEY)
  assert not holds_copied_prompts(shapes_of(traced.jaxpr))
  keys = row_keys(KEY, 2, G).reshape(2 * G, 1)
  traced = jax.make_jaxpr(decode_rows)(split_model()[1], copied(case.inputs()), keys)
  assert holds_copied_prompts(shapes_of(traced.jaxpr))


def test_sam2_encodes_each_picture_once(monkeypatch: pytest.MonkeyPatch):
  encoded = []
  original = Sam2.encode_image

  def counted(self, image, *args):
    encoded.append(image.shape)
    return original(self, image, *args)

  monkeypatch.setattr(Sam2, "encode_image", counted)
  state, frozen = case.state()
  rollout = make_rollout(case.GRPO, IDS)
  out = jax.eval_shape(rollout, state.trainable, frozen, case.inputs(), KEY)
  assert encoded == [(2, 64, 64, 3)]
  assert out.low_res_masks.shape == (2, G, M, 16, 16)
  assert out.image.stride16.shape[0] == 2
  assert out.visual.deepstack.shape == (2, 1, case.PATCHES // 4, 32)


def test_samples_stop_alone_and_say_only_what_is_allowed():
  allowed = set(range(tiny.VOCAB_SIZE)) - set(IDS.forbidden)
  assert len(allowed) == 5
  seen = set()
  for seed in range(SEED, SEED + 4):
    c = sampled(seed).completions
    for tokens, length, logps, slots in zip(
      c.tokens.reshape(-1, N).tolist(),
      c.lengths.flatten().tolist(),
      c.logps.reshape(-1, N),
      c.seg_slots.reshape(-1, M).tolist(),
      strict=True,
    ):
      assert length == (tokens.index(IDS.end) + 1 if IDS.end in tokens else N)
      assert set(tokens[:length]) <= allowed
      assert tokens[length:] == [IDS.pad] * (N - length)
      assert (logps[:length] < 0).all() and (logps[length:] == 0).all()
      at = [i for i, t in enumerate(tokens[: N - 1]) if t == IDS.seg][:M]
      assert slots == at + [-1] * (M - len(at))
      seen.add(length)
  assert len(seen) > 2
  assert rollout_function()._cache_size() == 1


def test_the_same_key_gives_the_same_samples_and_another_others():
  state, frozen = case.state()
  again = rollout_function()(state.trainable, frozen, case.inputs(), KEY)
  np.testing.assert_array_equal(again.completions.tokens, sampled().completions.tokens)
  assert (sampled(4).completions.tokens != sampled().completions.tokens).any()


@functools.cache
def full_forward() -> tuple[np.ndarray, np.ndarray, GenerationInputs]:
  """(hidden states, logits) of every sample behind its prompt, without a cache."""
  tokens = sampled().completions.tokens
  samples = [
    dataclasses.replace(p, input_ids=np.concatenate([p.input_ids, row]).astype(np.int32))
    for p, rows in zip(case.prompts(), tokens, strict=True)
    for row in rows
  ]
  inputs = case.padded(samples, case.PROMPT_SLOTS + 16)

  @jax.jit
  def run(params: nnx.State, inputs: GenerationInputs) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(split_model()[0], params)
    hidden = model.qwen(inputs.text, inputs.vision)
    return hidden, model.qwen.language_model.logits(hidden)

  hidden, logits = run(split_model()[1], inputs)
  return np.asarray(hidden), np.asarray(logits, np.float64), inputs


def first_new() -> np.ndarray:
  """Position of each sample's first new token."""
  return np.repeat([len(p.input_ids) for p in case.prompts()], G)


def test_logps_and_entropy_are_those_of_full_forwards_over_the_whole_vocabulary():
  _, logits, _ = full_forward()
  out = sampled()
  for i, start in enumerate(first_new()):
    length = out.completions.lengths.flatten()[i]
    rows = logits[i, start - 1 : start - 1 + length]
    logp = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    tokens = out.completions.tokens.reshape(-1, N)[i, :length]
    found = out.completions.logps.reshape(-1, N)[i, :length]
    np.testing.assert_allclose(found, logp[np.arange(length), tokens], atol=1e-4)
    entropy = -(np.exp(logp) * logp).sum(-1).mean()
    np.testing.assert_allclose(out.entropy.flatten()[i], entropy, atol=1e-4)


def test_masks_are_those_of_each_samples_own_states():
  """Row 0 has a [SEG] in its prompt, which gets no mask."""
  hidden, _, inputs = full_forward()
  model = nnx.merge(*split_model())
  out = sampled()
  slots = out.completions.seg_slots.reshape(-1, M)
  assert (slots >= 0).sum() >= 4 and (slots[:G] >= 0).any()

  def masks(shift: int) -> np.ndarray:
    positions = jnp.asarray(first_new()[:, None] + np.maximum(slots, 0) + shift)
    states = gather_positions(jnp.asarray(hidden), positions)
    return np.asarray(nnx.jit(Sa2VA.masks)(model, inputs.grounding_image, states).low_res_masks)

  found = out.low_res_masks.reshape(-1, M, 16, 16)[slots >= 0]
  np.testing.assert_allclose(found, masks(0)[slots >= 0], rtol=1e-4, atol=1e-4)
  assert np.abs(found - masks(1)[slots >= 0]).max() > 1e-2


def test_seg_slots_of_literal_tokens():
  tokens = jnp.asarray([[[7, 1, 7, 7, 7], [1, 1, 1, 1, 7]]])
  assert seg_slots(tokens, 7, 2).tolist() == [[[0, 2], [-1, -1]]]
  assert seg_slots(tokens, 7, 6).tolist() == [[[0, 2, 3, -1, -1, -1], [-1] * 6]]
