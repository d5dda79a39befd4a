"""Qwen3-VL against transformers' Qwen3VLForConditionalGeneration, random weights, float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.parity.qwen3_vl_weights import load_weights, source_shapes
from vrt_jax.config import ModelConfig, TextConfig, VisionConfig
from vrt_jax.data.positions import mrope_position_ids, vision_layout, visual_index
from vrt_jax.models.qwen3_vl import vision as vision_module
from vrt_jax.models.qwen3_vl.model import Qwen3VL
from vrt_jax.types import TextInputs, VisionInputs

IMAGE = 90
GRIDS = [[(1, 4, 6), (1, 6, 2)], [(1, 2, 8)]]
ALL_GRIDS = [grid for grids in GRIDS for grid in grids]
NUM_PATCHES = 40
TOLERANCE = 1e-4

TINY = ModelConfig(
  vision=VisionConfig(
    depth=4,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    patch_size=4,
    num_position_embeddings=25,
    out_hidden_size=40,
    deepstack_indexes=(0, 2),
  ),
  text=TextConfig(
    vocab_size=96,
    hidden_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=56,
    rope_theta=5e4,
    mrope_section=(4, 2, 2),
  ),
)
FULL_4B = ModelConfig(
  vision=VisionConfig(
    depth=24,
    hidden_size=1024,
    num_heads=16,
    intermediate_size=4096,
    patch_size=16,
    num_position_embeddings=2304,
    out_hidden_size=2560,
    deepstack_indexes=(5, 11, 17),
  ),
  text=TextConfig(
    vocab_size=151936,
    hidden_size=2560,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=9728,
    rope_theta=5e6,
    mrope_section=(24, 20, 20),
  ),
)


def hf_config(config: ModelConfig, image_token_id: int) -> Qwen3VLConfig:
  vision, text = config.vision, config.text
  return Qwen3VLConfig(
    vision_config={
      "depth": vision.depth,
      "hidden_size": vision.hidden_size,
      "num_heads": vision.num_heads,
      "intermediate_size": vision.intermediate_size,
      "patch_size": vision.patch_size,
      "num_position_embeddings": vision.num_position_embeddings,
      "out_hidden_size": vision.out_hidden_size,
      "deepstack_visual_indexes": list(vision.deepstack_indexes),
    },
    text_config={
      "vocab_size": text.vocab_size,
      "hidden_size": text.hidden_size,
      "num_hidden_layers": text.num_layers,
      "num_attention_heads": text.num_heads,
      "num_key_value_heads": text.num_kv_heads,
      "head_dim": text.head_dim,
      "intermediate_size": text.intermediate_size,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section),
        "mrope_interleaved": True,
      },
    },
    image_token_id=image_token_id,
    video_token_id=image_token_id + 1,
    tie_word_embeddings=text.tie_embeddings,
  )


def random_model(config: Qwen3VLConfig) -> Qwen3VLForConditionalGeneration:
  """A model in which no parameter keeps its initial value: norms near one, biases not zero."""
  torch.manual_seed(0)
  model = Qwen3VLForConditionalGeneration(config).eval()
  for name, parameter in model.named_parameters():
    noise = torch.randn_like(parameter)
    is_norm = "norm" in name and name.endswith("weight")
    width = parameter[0].numel() if parameter.ndim > 1 else 25
    parameter.data = 1 + 0.2 * noise if is_norm else noise * width**-0.5
  return model


def sample_ids() -> list[np.ndarray]:
  """Two prompts of different length, with two images and with one."""
  rng = np.random.default_rng(1)
  rows = []
  for grids in GRIDS:
    parts = [rng.integers(1, 80, 3)]
    for _, h, w in grids:
      parts += [np.full(h * w // 4, IMAGE), rng.integers(1, 80, 4)]
    rows.append(np.concatenate(parts).astype(np.int32))
  return rows


def make_inputs(config: ModelConfig) -> tuple[TextInputs, VisionInputs]:
  rng = np.random.default_rng(2)
  rows, merge = sample_ids(), config.vision.spatial_merge_size
  length = max(map(len, rows)) + 2
  text = TextInputs(
    np.zeros((2, length), np.int32),
    np.zeros((2, length), bool),
    np.zeros((3, 2, length), np.int32),
    np.full((2, length), -1, np.int32),
  )
  layouts = []
  for i, (ids, grids) in enumerate(zip(rows, GRIDS, strict=True)):
    n = len(ids)
    text.input_ids[i, :n], text.token_mask[i, :n] = ids, True
    text.position_ids[:, i, :n] = mrope_position_ids(ids, grids, IMAGE, merge)[0]
    text.visual_index[i, :n] = visual_index(ids, IMAGE)
    layouts.append(vision_layout(grids, NUM_PATCHES, merge, side=5))
  pixels = rng.integers(0, 256, (2, NUM_PATCHES, config.vision.patch_dim)).astype(np.uint8)
  fields = (np.stack(field) for field in zip(*layouts, strict=True))
  return text, VisionInputs(pixels, *fields)


@functools.cache
def setup(tied: bool):
  """Our model, the inputs and what transformers makes of them."""
  config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tie_embeddings=tied))
  torch_model = random_model(hf_config(config, IMAGE))
  model = nnx.eval_shape(lambda: Qwen3VL(config, nnx.Rngs(0)))
  load_weights(model, torch_model.state_dict())
  text, vision = make_inputs(config)
  pixels = (vision.pixel_values.astype(np.float32) - 127.5) / 127.5
  hidden = []
  torch_model.model.language_model.layers[-1].register_forward_hook(
    lambda module, args, output: hidden.append(output)
  )
  with torch.no_grad():
    logits = torch_model(
      input_ids=torch.tensor(text.input_ids, dtype=torch.long),
      attention_mask=torch.tensor(text.token_mask, dtype=torch.long),
      pixel_values=torch.tensor(pixels[vision.patch_segments > 0]),
      image_grid_thw=torch.tensor(ALL_GRIDS),
      mm_token_type_ids=torch.tensor(text.input_ids == IMAGE, dtype=torch.int),
    ).logits
  return model, torch_model, text, vision, hidden[0].numpy(), logits.numpy()


def run(model: Qwen3VL, text: TextInputs, vision: VisionInputs) -> tuple[np.ndarray, np.ndarray]:
  def forward(model, text, vision):
    hidden = model(text, vision)
    return hidden, model.language_model.logits(hidden)

  return tuple(np.asarray(a) for a in jax.jit(forward)(model, text, vision))


def error(ours: np.ndarray, theirs: np.ndarray, text: TextInputs) -> float:
  return float(np.abs(ours - theirs)[text.token_mask].max())


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_logits(tied):
  model, _, text, vision, hidden, logits = setup(tied)
  assert logits[text.token_mask].std() > 0.5  # the tolerance means something
  ours, our_logits = run(model, text, vision)
  assert our_logits.dtype == np.float32
  assert error(ours, hidden, text) < TOLERANCE
  assert error(our_logits, logits, text) < TOLERANCE


def test_float_pixels_are_taken_as_normalised():
  model, _, text, vision, _, logits = setup(True)
  pixels = (vision.pixel_values.astype(np.float32) - 127.5) / 127.5
  assert error(run(model, text, vision.replace(pixel_values=pixels))[1], logits, text) < TOLERANCE


def test_vision_tower_and_deepstack():
  model, torch_model, _, vision, _, _ = setup(True)
  tokens, deepstack = jax.jit(lambda model, v: model.visual(v, jnp.float32))(model, vision)
  pixels = (vision.pixel_values.astype(np.float32) - 127.5) / 127.5
  with torch.no_grad():
    theirs = torch_model.model.visual(
      torch.tensor(pixels[vision.patch_segments > 0]), grid_thw=torch.tensor(ALL_GRIDS)
    )
  valid = vision.patch_segments[:, ::4] > 0
  np.testing.assert_allclose(tokens[valid], theirs.pooler_output.numpy(), rtol=1e-5, atol=2e-5)
  assert deepstack.shape[0] == 2
  for ours, feature in zip(deepstack, theirs.deepstack_features, strict=True):
    np.testing.assert_allclose(ours[valid], feature.numpy(), rtol=1e-5, atol=2e-5)


def test_without_images():
  model, torch_model, text, _, _, _ = setup(False)
  ids = np.where(text.input_ids == IMAGE, 5, text.input_ids)
  positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), (3, *ids.shape))
  text = text.replace(input_ids=ids, position_ids=positions, visual_index=np.full_like(ids, -1))
  with torch.no_grad():
    logits = torch_model(
      input_ids=torch.tensor(ids, dtype=torch.long),
      attention_mask=torch.tensor(text.token_mask, dtype=torch.long),
    ).logits.numpy()
  assert error(run(model, text, None)[1], logits, text) < TOLERANCE


def test_zeroed_deepstack_fails(monkeypatch):
  model, _, text, vision, _, logits = setup(True)
  whole = vision_module.VisionTower._merge_taps
  monkeypatch.setattr(
    vision_module.VisionTower, "_merge_taps", lambda self, taps: 0 * whole(self, taps)
  )
  assert error(run(model, text, vision)[1], logits, text) > 100 * TOLERANCE


def test_one_dimensional_positions_fail():
  model, _, text, vision, _, logits = setup(True)
  length = text.input_ids.shape[1]
  flat = np.broadcast_to(np.arange(length, dtype=np.int32), text.position_ids.shape)
  ours = run(model, text.replace(position_ids=flat), vision)[1]
  assert error(ours, logits, text) > 100 * TOLERANCE


def test_tanh_gelu_in_the_merger_fails(monkeypatch):
  model, _, text, vision, _, logits = setup(True)
  monkeypatch.setattr(vision_module, "gelu_exact", vision_module.gelu_tanh)
  assert error(run(model, text, vision)[1], logits, text) > 2 * TOLERANCE


def test_rope_index_is_exact():
  _, torch_model, text, _, _, _ = setup(True)
  positions, deltas = torch_model.model.get_rope_index(
    torch.tensor(text.input_ids, dtype=torch.long),
    mm_token_type_ids=torch.tensor(text.input_ids == IMAGE, dtype=torch.int),
    image_grid_thw=torch.tensor(ALL_GRIDS),
    attention_mask=torch.tensor(text.token_mask, dtype=torch.long),
  )
  np.testing.assert_array_equal(text.position_ids, positions.numpy())
  for ids, grids, delta in zip(sample_ids(), GRIDS, deltas, strict=True):
    assert mrope_position_ids(ids, grids, IMAGE, 2)[1] == int(delta)


def test_4b_shapes():
  with torch.device("meta"):
    theirs = Qwen3VLForConditionalGeneration(hf_config(FULL_4B, 151655))
  ours = nnx.eval_shape(lambda: Qwen3VL(FULL_4B, nnx.Rngs(0)))
  for name, (shape, expected) in source_shapes(ours, theirs.state_dict()).items():
    assert shape == expected, name
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
  assert count == sum(p.numel() for p in theirs.parameters()) == 4_437_815_808
