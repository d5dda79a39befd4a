"""Cached decoding against full forward passes, and the masks of generated [SEG] tokens."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from vrt_jax.data.transforms import Prompt, make_prompt, pad_inputs
from vrt_jax.generate import decode
from vrt_jax.generate.decode import GenerationInputs, TokenIds, store_seg_states
from vrt_jax.generate.generation import Generation, generate, write_text
from vrt_jax.generate.sampling import Sampling
from vrt_jax.models.qwen3_vl import text
from vrt_jax.models.qwen3_vl.cache import GroupCache, KVCache, LayerCache
from vrt_jax.models.sa2va import Sa2VA, gather_positions
from vrt_jax.types import TextInputs, VisionInputs

PROMPT_SLOTS = 64
FULL_SLOTS = 80
QUESTIONS = ("Where is the [SEG] key that opens the door over there?", "What?")
NEW_TOKENS = 8
MAX_MASKS = 4
GREEDY = Sampling()


@functools.cache
def prompts() -> tuple[Prompt, ...]:
  """Prompts of different lengths and picture sizes; the first holds a [SEG]."""
  made = [
    make_prompt(
      tiny.train_record(i).image, f"<image>\n{q}", tiny.tokenizer(), tiny.IMAGE, inference=True
    )[0]
    for i, q in enumerate(QUESTIONS)
  ]
  assert len(made[0].input_ids) > len(made[1].input_ids) + 5
  assert len(made[0].patches) > len(made[1].patches)
  return tuple(made)


def pad(samples: tuple[Prompt, ...], slots: int) -> tuple[TextInputs, VisionInputs, np.ndarray]:
  return pad_inputs(list(samples), (slots, 64), tiny.tokenizer(), tiny.IMAGE, position_side=4)


@functools.cache
def inputs() -> GenerationInputs:
  images = np.stack([p.grounding_image for p in prompts()])
  return GenerationInputs(*pad(prompts(), PROMPT_SLOTS), images)


def ids(allowed: tuple[int, ...] | None = None) -> TokenIds:
  """The special ids; with `allowed`, all others are forbidden."""
  t = tiny.tokenizer()
  forbidden = t.never_sample_ids
  if allowed is not None:
    forbidden = tuple(i for i in range(tiny.VOCAB_SIZE) if i not in allowed)
  return TokenIds(seg=t.seg_id, end=t.im_end_id, pad=t.endoftext_id, forbidden=forbidden)


def run(token_ids: TokenIds, sampling: Sampling = GREEDY, seed: int = 0) -> Generation:
  out = generate(
    *nnx.split(tiny.loaded().model),
    inputs(),
    jax.random.key(seed),
    max_new_tokens=NEW_TOKENS,
    max_masks=MAX_MASKS,
    sampling=sampling,
    ids=token_ids,
  )
  return jax.device_get(out)


@nnx.jit
def full_forward(
  model: Sa2VA, text: TextInputs, vision: VisionInputs
) -> tuple[jax.Array, jax.Array]:
  """(pre-norm hidden states, logits) without a cache."""
  hidden = model.qwen(text, vision)
  return hidden, model.qwen.language_model.logits(hidden)


def extended(tokens: np.ndarray) -> tuple[TextInputs, VisionInputs]:
  """The prompts with new tokens right behind their own, positions made from scratch."""
  samples = tuple(
    Prompt(np.concatenate([p.input_ids, row]).astype(np.int32), p.patches, p.grids, None)
    for p, row in zip(prompts(), tokens, strict=True)
  )
  return pad(samples, FULL_SLOTS)[:2]


def prompt_lengths() -> np.ndarray:
  return np.array([len(p.input_ids) for p in prompts()])


def test_greedy_equals_a_full_forward_pass_for_every_token():
  out = run(ids())
  forbidden = list(ids().forbidden)
  tokens = np.zeros((2, 0), np.int32)
  done = np.zeros(2, bool)
  for _ in range(NEW_TOKENS):
    _, logits = full_forward(tiny.loaded().model, *extended(tokens))
    last = np.array(logits[np.arange(2), prompt_lengths() + tokens.shape[1] - 1])
    last[:, forbidden] = -np.inf
    chosen = np.where(done, ids().pad, last.argmax(-1)).astype(np.int32)
    done |= chosen == ids().end
    tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
  np.testing.assert_array_equal(out.tokens, tokens)
  assert len(set(tokens.flatten().tolist())) > 3
  assert (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize(
  "platform, stages, read",
  [("gpu", 1, {None}), ("tpu", 1, {None}), ("tpu", 3, {2, 5, NEW_TOKENS})],
)
def test_every_platform_says_the_same(monkeypatch, platform, stages, read):
  """CPUs and GPUs have layers one by one, TPUs a scan, and loops that read ever more slots."""
  token_ids = ids(allowed=(ids().seg, 40, 41))
  assert isinstance(decoding_cache()[0], LayerCache)
  expected = run(token_ids)
  seen, attend = set(), GroupCache.attend

  def attends(self, *given):
    seen.add(self.slots_read)
    return attend(self, *given)

  monkeypatch.setattr(GroupCache, "attend", attends)
  monkeypatch.setattr(decode, "on_tpu", lambda: stages > 1)
  monkeypatch.setattr(decode, "STAGES", stages)
  monkeypatch.setattr(decode, "MIN_STAGED", NEW_TOKENS)
  monkeypatch.setattr(text, "platform", lambda: platform)
  jax.clear_caches()
  cache = decoding_cache()
  layers = [cache] if platform == "tpu" else cache
  assert all(isinstance(layer, GroupCache) for layer in layers)
  assert sum(len(layer.k) for layer in layers) == tiny.MODEL.text.num_layers
  out = run(token_ids)
  jax.clear_caches()
  assert seen == read
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  np.testing.assert_allclose(out.low_res_masks, expected.low_res_masks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_tpus_bring_gathered_weights_into_order_before_the_loop(monkeypatch, platform):
  monkeypatch.setattr(text, "platform", lambda: platform)
  decoder = tiny.loaded().model.qwen.language_model
  graphdef, state = nnx.split(decoder)
  mask = jnp.ones((1, 4), bool)
  cache = GroupCache.start(KVCache.zeros(tiny.MODEL.text, 1, 4, jnp.float32), mask, 1, 2)

  def layers(state: nnx.State) -> nnx.State:
    return nnx.state(nnx.merge(graphdef, state).for_decoding(cache)[0].layers)

  program = str(jax.make_jaxpr(layers)(state))
  parameters = len(jax.tree.leaves(nnx.state(decoder.layers)))
  assert program.count("layout_constraint[") == (parameters if platform == "tpu" else 0)


def test_a_token_is_written_to_the_cache_in_place():
  """No copy of keys or values, which alone have so many slots as last axis, on CPUs."""
  slots = 11
  lowered = write_text.lower(
    *nnx.split(tiny.loaded().model),
    inputs(),
    jax.random.key(0),
    max_new_tokens=slots,
    max_masks=MAX_MASKS,
    sampling=GREEDY,
    ids=ids(),
  )
  computations = re.split(r"^}", lowered.compile().as_text(), flags=re.MULTILINE)
  written = rf"dynamic-update-slice\S* = f32\[[\d,]+,{slots}\]"
  (body,) = [text for text in computations if re.search(written, text)]
  assert not re.search(rf"= f32\[[\d,]+,{slots}\]\S* copy\(", body)


def decoding_cache():
  """What the decoder would loop over."""
  mask = jnp.ones((1, 4), bool)
  prompt = KVCache.zeros(tiny.MODEL.text, 1, 4, jnp.float32)
  cache = GroupCache.start(prompt, mask, 1, 2)
  return tiny.loaded().model.qwen.language_model.for_decoding(cache)[1]


def test_decoding_leaves_the_model_as_it_was():
  before = nnx.graphdef(tiny.loaded().model)
  decoding_cache()
  assert nnx.graphdef(tiny.loaded().model) == before


@functools.cache
def only_seg() -> Generation:
  """[SEG] is all that may be said: row 0 has one more in its prompt."""
  return run(ids(allowed=(tiny.tokenizer().seg_id,)))


def test_seg_counts_with_the_prompt_and_without_the_last_token():
  out = only_seg()
  assert (out.tokens == tiny.tokenizer().seg_id).all()
  assert out.lengths.tolist() == [NEW_TOKENS, NEW_TOKENS]
  assert out.num_segs.tolist() == [1 + NEW_TOKENS - 1, NEW_TOKENS - 1]
  assert out.low_res_masks.shape == (2, MAX_MASKS, 16, 16)
  assert out.iou_pred.shape == (2, MAX_MASKS)


def masks_of_full_forward(tokens: np.ndarray, shift: int = 0) -> np.ndarray:
  """Masks prompted by the full forward's states at the first MAX_MASKS [SEG] input tokens."""
  model = tiny.loaded().model
  text, vision = extended(tokens)
  hidden, _ = full_forward(model, text, vision)
  seg = tiny.tokenizer().seg_id
  positions = np.stack([np.flatnonzero(row == seg)[:MAX_MASKS] for row in text.input_ids])
  out = nnx.jit(Sa2VA.masks)(
    model, inputs().grounding_image, gather_positions(hidden, jnp.asarray(positions + shift))
  )
  return np.asarray(out.low_res_masks)


def test_seg_masks_equal_those_of_the_full_forward_and_overflow_is_dropped():
  out = only_seg()
  expected = masks_of_full_forward(out.tokens)
  np.testing.assert_allclose(out.low_res_masks, expected, rtol=1e-4, atol=1e-4)
  shifted = masks_of_full_forward(out.tokens, shift=-1)
  assert np.abs(out.low_res_masks - shifted).max() > 1e-2


def test_the_end_token_stops_a_row_and_pads_it():
  token_ids = ids(allowed=(ids().end, ids().seg, 40, 41))
  lengths = set()
  for seed in range(6):
    out = run(token_ids, Sampling(5.0), seed)
    assert set(out.tokens.flatten().tolist()) <= {ids().end, ids().seg, ids().pad, 40, 41}
    for i, row in enumerate(out.tokens.tolist()):
      length = row.index(ids().end) + 1 if ids().end in row else NEW_TOKENS
      assert out.lengths[i] == length
      assert row[length:] == [ids().pad] * (NEW_TOKENS - length)
      assert ids().pad not in row[:length]
      seen = row[: min(length, NEW_TOKENS - 1)].count(ids().seg)
      assert out.num_segs[i] == seen + (1 if i == 0 else 0)
      lengths.add(length)
  assert len(lengths) > 2
  assert (run(token_ids, Sampling(5.0), 0).tokens == run(token_ids, Sampling(5.0), 0).tokens).all()


def test_store_seg_states_appends_row_by_row_and_drops_the_rest():
  buffer = jnp.zeros((2, 2, 1))
  hidden = jnp.asarray([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
  is_seg = jnp.asarray([[True, False, True], [False, True, False]])
  buffer, count = store_seg_states(buffer, jnp.zeros(2, jnp.int32), hidden, is_seg)
  assert buffer[..., 0].tolist() == [[1, 3], [5, 0]]
  assert count.tolist() == [2, 1]
  buffer, count = store_seg_states(buffer, count, 10 * hidden[:, :1], jnp.ones((2, 1), bool))
  assert buffer[..., 0].tolist() == [[1, 3], [5, 40]]
  assert count.tolist() == [3, 2]
