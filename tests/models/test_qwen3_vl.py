"""Qwen3-VL invariants: cache equals full forward, remat, LoRA dropout, padding, shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vrt_jax.config import LoraConfig, ModelConfig, TextConfig, VisionConfig
from vrt_jax.data.positions import mrope_position_ids, vision_layout, visual_index
from vrt_jax.models.qwen3_vl import text_layer
from vrt_jax.models.qwen3_vl.cache import KVCache
from vrt_jax.models.qwen3_vl.model import Qwen3VL
from vrt_jax.models.qwen3_vl.text_layer import TextMLP
from vrt_jax.ops import cpu_attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.types import TextInputs, VisionInputs

IMAGE = 60
GRIDS = [(1, 4, 4), (1, 2, 4)]
PROMPTS = (10, 7)  # prompt lengths of the two rows; the longer has a larger image
NUM_NEW = 3
CONFIG = ModelConfig(
  vision=VisionConfig(
    depth=2,
    hidden_size=16,
    num_heads=2,
    intermediate_size=24,
    patch_size=2,
    num_position_embeddings=9,
    out_hidden_size=24,
    deepstack_indexes=(0, 1),
  ),
  text=TextConfig(
    vocab_size=64,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=32,
    mrope_section=(2, 1, 1),
  ),
)


def randomised(config: ModelConfig) -> Qwen3VL:
  """A model with numpy-made parameters (compiling the initialisers would take seconds)."""
  rng = np.random.default_rng(0)
  model = nnx.eval_shape(lambda: Qwen3VL(config, nnx.Rngs(0)))
  flat = nnx.to_flat_state(nnx.state(model))
  for path, leaf in flat:
    noise = rng.normal(size=leaf.shape)
    value = 1 + 0.1 * noise if path[-2].find("norm") >= 0 else 0.3 * noise
    leaf.set_value(jnp.asarray(value, jnp.float32))
  nnx.update(model, nnx.from_flat_state(flat))
  return model


@functools.cache
def build(lora_rank: int = 0) -> Qwen3VL:
  return randomised(dataclasses.replace(CONFIG, lora=LoraConfig(lora_rank, 8.0, 0.5)))


def rows(length: int) -> list[np.ndarray]:
  """Ids of the two samples: one text token, the image, then text up to `length` + NUM_NEW."""
  rng = np.random.default_rng(0)
  out = []
  for (_, h, w), prompt in zip(GRIDS, PROMPTS, strict=True):
    tail = rng.integers(0, 50, length)
    ids = np.concatenate([[1], np.full(h * w // 4, IMAGE), tail])
    out.append(ids[: prompt + NUM_NEW].astype(np.int32))
  return out


def make_inputs(num_patches: int = 20, padding: int = 2) -> tuple[TextInputs, VisionInputs]:
  samples = rows(20)
  length = max(map(len, samples)) + padding
  text = TextInputs(
    np.zeros((2, length), np.int32),
    np.zeros((2, length), bool),
    np.zeros((3, 2, length), np.int32),
    np.full((2, length), -1, np.int32),
  )
  for i, (ids, grid) in enumerate(zip(samples, GRIDS, strict=True)):
    n = len(ids)
    text.input_ids[i, :n], text.token_mask[i, :n] = ids, True
    text.position_ids[:, i, :n] = mrope_position_ids(ids, [grid], IMAGE, 2)[0]
    text.visual_index[i, :n] = visual_index(ids, IMAGE)
  layouts = [vision_layout([grid], num_patches, 2, side=3) for grid in GRIDS]
  pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 24)).astype(np.uint8)
  fields = (np.stack(field) for field in zip(*layouts, strict=True))
  return text, VisionInputs(pixels[:, :num_patches], *fields)


def call(model: Qwen3VL, *args, **options) -> jax.Array:
  return model(*args, **options)


forward = jax.jit(call, static_argnames=("dtype",))


def test_prefill_and_decode_equal_the_full_forward():
  model = build()
  text, vision = make_inputs()
  full = forward(model, text, vision)
  prompt_length, num_slots = max(PROMPTS), max(PROMPTS) + NUM_NEW + 2
  segments = np.zeros((2, num_slots), np.int32)
  for i, n in enumerate(PROMPTS):
    segments[i, :n] = 1
  prompt = jax.tree.map(lambda a: a[..., :prompt_length], text)
  cache = KVCache.zeros(CONFIG.text, 2, num_slots, jnp.float32)

  @jax.jit
  def prefill(prompt, vision, cache, segments):
    embeds, deepstack = model.embed_multimodal(prompt, vision)
    mask = AttentionMask(segments[:, :prompt_length], segments, jnp.arange(prompt_length))
    return model.language_model.hidden_states(
      embeds, prompt.position_ids, mask, deepstack, prompt.visual_index, cache, 0
    )

  @jax.jit
  def decode(ids, positions, cache, segments, slot):
    mask = AttentionMask(jnp.ones_like(ids), segments, slot[None])
    embeds = model.language_model.embed(ids)
    return model.language_model.hidden_states(embeds, positions, mask, cache=cache, cache_slot=slot)

  hidden, cache = prefill(prompt, vision, cache, segments)
  for i, n in enumerate(PROMPTS):
    np.testing.assert_allclose(hidden[i, :n], full[i, :n], rtol=1e-4, atol=1e-5)
  batch = np.arange(2)
  for step in range(NUM_NEW):
    at = np.array(PROMPTS) + step  # the rows are at different tokens, but write the same slot
    slot = prompt_length + step
    segments[:, slot] = 1
    ids, positions = text.input_ids[batch, at][:, None], text.position_ids[:, batch, at][..., None]
    hidden, cache = decode(ids, positions, cache, segments.copy(), jnp.asarray(slot))
    np.testing.assert_allclose(hidden[:, 0], full[batch, at], rtol=1e-4, atol=1e-5)


def test_chunked_attention_gives_the_same_states(monkeypatch):
  text, vision = make_inputs()
  whole = forward(build(), text, vision)
  monkeypatch.setattr(cpu_attention, "MIN_BY_HEAD", 1)
  monkeypatch.setattr(cpu_attention, "QUERY_CHUNK", 6)
  chunked = jax.jit(lambda *args: call(*args))(build(), text, vision)  # traced anew
  np.testing.assert_allclose(chunked[text.token_mask], whole[text.token_mask], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
  text, vision = make_inputs()
  short = forward(build(), text, vision)
  long_text, long_vision = make_inputs(num_patches=32, padding=7)
  long = forward(build(), long_text, long_vision)
  np.testing.assert_allclose(
    long[long_text.token_mask], short[text.token_mask], rtol=1e-4, atol=1e-5
  )
  assert np.isfinite(np.asarray(long)).all()


@pytest.mark.parametrize("remat", ["full", "linears"])
def test_remat_keeps_loss_and_gradients(remat):
  """With LoRA dropout, whose masks the backward pass has to draw again."""
  text, _ = make_inputs()
  graphdef, lora, frozen = nnx.split(build(lora_rank=2), nnx.LoRAParam, ...)
  key = jax.random.key(1, impl="rbg")

  def loss(lora, frozen, remat):
    model = nnx.merge(graphdef, lora, frozen)
    hidden = model(text, None, remat=remat, dropout_key=key)
    return jnp.mean(jnp.where(text.token_mask[:, :, None], hidden, 0) ** 2)

  plain, again = (
    jax.jit(jax.value_and_grad(lambda *args, r=r: loss(*args, r)))(lora, frozen)
    for r in ("none", remat)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)
  leaves = jax.tree.leaves(plain[1])
  assert len(leaves) == 14  # A and B of seven linears, stacked over layers
  assert all(float(jnp.abs(leaf).max(axis=(1, 2)).min()) > 0 for leaf in leaves)


@pytest.mark.parametrize("rank", [0, 2])
def test_remat_keeps_a_linear_layer_s_sum_and_not_its_parts(rank):
  """Of the MLP's wide arrays: all with "none", gate and upper half with "linears", else nothing."""
  text, _ = make_inputs()
  graphdef, params = nnx.split(build(lora_rank=rank))
  wide = nnx.merge(graphdef, params).language_model.config.intermediate_size

  def kept(remat: str) -> int:
    def run(params):
      return nnx.merge(graphdef, params)(text, None, remat=remat)

    leaves = {id(x): x for x in jax.tree.leaves(jax.vjp(run, params)[1])}
    shapes = [getattr(x, "shape", ()) for x in leaves.values()]
    return sum(shape[-1:] == (wide,) and len(shape) == 4 for shape in shapes)  # [L, B, T, F]

  assert kept("none") >= 3
  assert (kept("linears"), kept("full")) == (2, 0)


def test_the_backward_pass_of_an_mlp_keeps_three_wide_arrays(monkeypatch):
  """The gate's and the upper half's outputs, and their product, which an adapter reads."""
  config = TextConfig(hidden_size=8, intermediate_size=40)
  mlp = TextMLP(config, LoraConfig(rank=2), nnx.Rngs(0))

  def kept() -> int:
    _, backward = jax.vjp(lambda x: mlp(x, None), jnp.ones((1, 6, 8)))
    leaves = {id(x): x for x in jax.tree.leaves(backward)}
    return sum(getattr(x, "shape", ())[-2:] == (6, 40) for x in leaves.values())

  assert kept() <= 3
  monkeypatch.setattr(text_layer, "_gated", lambda gate, up: jax.nn.silu(gate) * up)
  assert kept() > 3


def test_lora_dropout_follows_its_key():
  model = build(lora_rank=2)
  text, vision = make_inputs()
  runs = [
    forward(model, text, vision, dropout_key=jax.random.key(k, impl="rbg")) for k in (1, 1, 2)
  ]
  np.testing.assert_array_equal(runs[0], runs[1])
  assert float(jnp.abs(runs[0] - runs[2]).max()) > 1e-3
  assert float(jnp.abs(runs[0] - forward(model, text, vision)).max()) > 1e-3


def test_logits_follow_the_final_norm():
  model = build()
  text, vision = make_inputs()
  hidden = forward(model, text, vision)
  decoder = model.language_model
  logits = decoder.logits(hidden.astype(jnp.bfloat16))
  assert logits.dtype == jnp.float32
  expected = decoder.final_norm(hidden) @ decoder.embed_tokens.weight[...].T
  np.testing.assert_allclose(decoder.logits(hidden), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_compute_stays_bfloat16():
  text, vision = make_inputs()
  hidden = forward(build(), text, vision, dtype=jnp.bfloat16)
  assert hidden.dtype == jnp.bfloat16
  full = forward(build(), text, vision)
  error = np.abs(np.asarray(hidden, np.float32) - full)[text.token_mask]
  assert 0 < error.max() < 0.05 * np.abs(full[text.token_mask]).max()


def test_no_deepstack():
  vision_config = dataclasses.replace(CONFIG.vision, deepstack_indexes=())
  model = randomised(dataclasses.replace(CONFIG, vision=vision_config))
  text, vision = make_inputs()
  features = model.visual_features(vision).deepstack
  assert features.shape == (len(text.input_ids), 0, vision.pixel_values.shape[1] // 4, 24)
  hidden = forward(model, text, vision)
  assert hidden.shape == (*text.input_ids.shape, 24)
  embeds, deepstack = model.embed_multimodal(text, vision)
  np.testing.assert_array_equal(deepstack, jnp.moveaxis(features, 1, 0))
  segments = text.token_mask.astype(jnp.int32)
  args = embeds, text.position_ids, AttentionMask.causal(segments, segments)
  plain, _ = model.language_model.hidden_states(*args)
  np.testing.assert_allclose(plain, hidden, rtol=1e-5, atol=1e-5)


def test_errors():
  vision_config = dataclasses.replace(CONFIG.vision, out_hidden_size=16)
  with pytest.raises(ValueError, match="out_hidden_size 16"):
    Qwen3VL(dataclasses.replace(CONFIG, vision=vision_config), nnx.Rngs(0))
  mask = AttentionMask(jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
  with pytest.raises(ValueError, match="visual_index"):
    build().language_model.hidden_states(
      jnp.zeros((1, 1, 24)), jnp.zeros((3, 1, 1), jnp.int32), mask, jnp.zeros((2, 1, 4, 24))
    )
