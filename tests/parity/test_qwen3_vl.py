"""Qwen3-VL against transformers' Qwen3VLForConditionalGeneration, random weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3VLForConditionalGeneration

from tests.parity.errors import max_error, unit_error
from tests.parity.qwen3_vl_case import (
  ALL_GRIDS,
  GRIDS,
  IMAGE,
  SEG,
  forward_torch,
  layer_at,
  normalised,
  record,
  run,
  sample_ids,
  setup,
)
from tests.parity.qwen3_vl_weights import hf_config, source_shapes
from vrt_jax.config import ModelConfig, TextConfig, VisionConfig
from vrt_jax.data.positions import mrope_position_ids
from vrt_jax.models.layers import RMSNorm, gelu_exact
from vrt_jax.models.qwen3_vl import text as text_module
from vrt_jax.models.qwen3_vl import text_layer as layer_module
from vrt_jax.models.qwen3_vl import vision as vision_module
from vrt_jax.models.qwen3_vl.model import Qwen3VL
from vrt_jax.models.qwen3_vl.text_layer import TextMLP
from vrt_jax.ops import rope as rope_module
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.rope import mrope_cos_sin

BLOCK = 1e-5
LOGITS = 1e-4
WIDE = 100 * LOGITS

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


def logits_error(tied: bool = True, **changed: np.ndarray) -> float:
  """Our logits against transformers' over real tokens; `changed` text inputs replace ours."""
  model, _, text, vision, reference = setup(tied)
  ours = run(model, text.replace(**changed), vision)[1]
  return max_error(ours[text.token_mask], reference.logits[text.token_mask])


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_logits(tied):
  """Two images in one sample, one in the other, which is right-padded."""
  model, _, text, vision, reference = setup(tied)
  real = text.token_mask
  assert real.sum(axis=1).tolist() == [24, 15]
  assert reference.logits[real].std() > 0.5  # the tolerance means something
  hidden, logits = run(model, text, vision)
  assert logits.dtype == np.float32
  assert unit_error(hidden[real], reference.hidden_states[real]) < BLOCK
  assert max_error(logits[real], reference.logits[real]) < LOGITS


def test_every_decoder_layer():
  model, _, text, _, reference = setup()
  config = model.language_model.config
  position_ids = jnp.asarray(text.position_ids)
  rope = mrope_cos_sin(position_ids, config.head_dim, config.rope_theta, config.mrope_section)
  segments = jnp.asarray(text.token_mask, jnp.int32)
  mask = AttentionMask(segments, segments, jnp.arange(segments.shape[1]))
  assert len(reference.decoder_layers) == config.num_layers
  for i, (given, expected) in enumerate(reference.decoder_layers):
    layer = layer_at(model.language_model.layers, i)
    ours, _ = layer(jnp.asarray(given), rope, mask, None, None)
    assert unit_error(ours[text.token_mask], expected[text.token_mask]) < BLOCK


def left_padded(rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
  """(ids, mask) with the padding in front, as transformers generates."""
  ids = np.stack([np.pad(row, (length - len(row), 0)) for row in rows])
  return ids, np.stack([np.arange(length) >= length - len(row) for row in rows])


def test_right_padding_equals_left_padding_of_transformers():
  model, torch_model, text, vision, _ = setup()
  ids, mask = left_padded(sample_ids(), text.input_ids.shape[1])
  layers = torch_model.model.language_model.layers
  calls = record(layers[-1:])
  theirs = forward_torch(torch_model, ids, mask, vision)
  hidden, logits = run(model, text, vision)
  assert unit_error(hidden[text.token_mask], calls[-1][1][mask]) < BLOCK
  assert max_error(logits[text.token_mask], theirs.logits.numpy()[mask]) < LOGITS
  unmasked = forward_torch(torch_model, ids, np.ones_like(mask), vision).logits.numpy()
  assert max_error(logits[text.token_mask], unmasked[mask]) > WIDE


def test_state_at_seg_is_before_the_final_norm():
  """The last layer's output; `hidden_states[-1]` of transformers 5 is normed and must not agree."""
  model, _, text, vision, reference = setup()
  at_seg = text.input_ids == SEG
  assert at_seg.sum(axis=1).tolist() == [2, 2]
  ours = run(model, text, vision)[0][at_seg]
  assert unit_error(ours, reference.hidden_states[at_seg]) < BLOCK
  post_norm = reference.final_states[at_seg]
  assert unit_error(model.language_model.final_norm(jnp.asarray(ours)), post_norm) < BLOCK
  assert unit_error(ours, post_norm) > 0.1
  neighbour = np.roll(at_seg, -1, axis=1)  # the token that predicts [SEG]
  assert unit_error(ours, reference.hidden_states[neighbour]) > 0.1


def test_float_pixels_are_taken_as_normalised():
  model, _, text, vision, reference = setup()
  floats = vision.replace(pixel_values=normalised(vision))
  ours = run(model, text, floats)[1][text.token_mask]
  assert max_error(ours, reference.logits[text.token_mask]) < LOGITS


def test_without_images():
  model, torch_model, text, _, _ = setup(False)
  ids = np.where(text.input_ids == IMAGE, 5, text.input_ids)
  positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), (3, *ids.shape))
  text = text.replace(input_ids=ids, position_ids=positions, visual_index=np.full_like(ids, -1))
  theirs = forward_torch(torch_model, ids, text.token_mask, None).logits.numpy()
  assert max_error(run(model, text, None)[1][text.token_mask], theirs[text.token_mask]) < LOGITS


def test_rope_index_is_exact():
  _, torch_model, text, _, _ = setup()
  positions, deltas = torch_model.model.get_rope_index(
    torch.tensor(text.input_ids, dtype=torch.long),
    mm_token_type_ids=torch.tensor(text.input_ids == IMAGE, dtype=torch.int),
    image_grid_thw=torch.tensor(ALL_GRIDS),
    attention_mask=torch.tensor(text.token_mask, dtype=torch.long),
  )
  np.testing.assert_array_equal(text.position_ids, positions.numpy())
  for ids, grids, delta in zip(sample_ids(), GRIDS, deltas, strict=True):
    assert mrope_position_ids(ids, grids, IMAGE, 2)[1] == int(delta)


def test_norms_have_their_eps():
  """At a variance near eps, where 1e-5 instead of 1e-6 shows."""
  model, torch_model, _, _, _ = setup()
  x = 2e-3 * np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
  theirs = torch_model.model.language_model.layers[1].input_layernorm(torch.tensor(x))
  ours = layer_at(model.language_model.layers, 1).input_layernorm
  assert unit_error(ours(jnp.asarray(x)), theirs) < BLOCK
  ours.eps = 1e-5
  assert unit_error(ours(jnp.asarray(x)), theirs) > WIDE


def test_one_dimensional_positions_fail():
  text = setup()[2]
  flat = np.arange(text.input_ids.shape[1], dtype=np.int32)
  assert logits_error(position_ids=np.broadcast_to(flat, text.position_ids.shape)) > WIDE


def test_exchanged_visual_tokens_fail():
  index = setup()[2].visual_index
  assert logits_error(visual_index=np.where(index >= 0, index ^ 1, index)) > WIDE


def _zeroed_deepstack(monkeypatch):
  whole = vision_module.VisionTower._merge_taps
  monkeypatch.setattr(
    vision_module.VisionTower, "_merge_taps", lambda self, taps: 0 * whole(self, taps)
  )


def _deepstack_one_layer_late(monkeypatch):
  whole = text_module._add_deepstack
  monkeypatch.setattr(
    text_module,
    "_add_deepstack",
    lambda x, features, index, layer: whole(
      x, jnp.pad(features, ((1, 0), (0, 0), (0, 0), (0, 0))), index, layer
    ),
  )


def _sections_one_after_the_other(monkeypatch):
  monkeypatch.setattr(rope_module, "mrope_axes", lambda sections: np.repeat(range(3), sections))


def _heads_interleaved_over_groups(monkeypatch):
  """Query head n reads key head n mod K instead of n // (N / K)."""
  whole = layer_module.attention

  def interleaved(q, k, v, mask):
    repeats = q.shape[2] // k.shape[2]
    return whole(q, jnp.tile(k, (1, 1, repeats, 1)), jnp.tile(v, (1, 1, repeats, 1)), mask)

  monkeypatch.setattr(layer_module, "attention", interleaved)


def _no_query_and_key_norms(monkeypatch):
  whole = RMSNorm.__call__
  monkeypatch.setattr(RMSNorm, "__call__", lambda self, x: x if x.ndim == 4 else whole(self, x))


def _gelu_instead_of_silu(monkeypatch):
  monkeypatch.setattr(
    TextMLP,
    "__call__",
    lambda self, x, keys: self.down_proj(gelu_exact(self.gate_proj(x)) * self.up_proj(x)),
  )


@pytest.mark.parametrize(
  "damage",
  [
    _zeroed_deepstack,
    _deepstack_one_layer_late,
    _sections_one_after_the_other,
    _heads_interleaved_over_groups,
    _no_query_and_key_norms,
    _gelu_instead_of_silu,
  ],
)
def test_damaged_model_fails(monkeypatch, damage):
  damage(monkeypatch)
  assert logits_error() > WIDE


def test_embedding_as_head_of_an_untied_model_fails(monkeypatch):
  model = setup(False)[0]
  monkeypatch.setattr(
    model.language_model.lm_head, "weight", model.language_model.embed_tokens.weight
  )
  assert logits_error(False) > WIDE


def test_4b_shapes():
  with torch.device("meta"):
    theirs = Qwen3VLForConditionalGeneration(hf_config(FULL_4B, 151655))
  ours = nnx.eval_shape(lambda: Qwen3VL(FULL_4B, nnx.Rngs(0)))
  for name, (shape, expected) in source_shapes(ours, theirs.state_dict()).items():
    assert shape == expected, name
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
  assert count == sum(p.numel() for p in theirs.parameters()) == 4_437_815_808
