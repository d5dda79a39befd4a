"""The vision tower against transformers' Qwen3VLVisionModel: blocks, tokens, DeepStack features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity.errors import unit_error
from tests.parity.qwen3_vl_case import GRIDS, NUM_PATCHES, POSITION_SIDE, layer_at, setup
from vrt_jax.data import positions as positions_module
from vrt_jax.data.positions import vision_layout
from vrt_jax.models.qwen3_vl import vision as vision_module
from vrt_jax.models.qwen3_vl.vision import PatchMerger, VisionTower
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.rope import vision_cos_sin
from vrt_jax.types import VisionInputs

TOLERANCE = 1e-5
WIDE = 100 * TOLERANCE


def tower_error(tower: VisionTower, vision: VisionInputs) -> float:
  """The worst of the visual tokens and the DeepStack features; rows of padding left out."""
  reference = setup()[-1]
  tokens, deepstack = jax.jit(lambda tower, v: tower(v, jnp.float32))(tower, vision)
  valid = setup()[3].patch_segments[:, ::4] > 0
  assert len(deepstack) == len(reference.deepstack) == 2
  errors = [unit_error(tokens[valid], reference.vision_tokens)]
  for ours, theirs in zip(deepstack, reference.deepstack, strict=True):
    errors.append(unit_error(ours[valid], theirs))
  return max(errors)


def test_visual_tokens_and_deepstack_features():
  model, _, _, vision, reference = setup()
  assert reference.vision_tokens.std() > 0.5
  assert all(feature.std() > 0.1 for feature in reference.deepstack)
  assert tower_error(model.visual, vision) < TOLERANCE


def test_every_block():
  model, _, _, vision, reference = setup()
  valid = vision.patch_segments > 0
  mask = AttentionMask(vision.patch_segments, vision.patch_segments)
  config = model.visual.config
  rope = vision_cos_sin(vision.patch_positions, config.hidden_size // config.num_heads)
  assert len(reference.vision_blocks) == config.depth
  for i, (given, expected) in enumerate(reference.vision_blocks):
    x = np.zeros((*valid.shape, config.hidden_size), np.float32)
    x[valid] = given
    ours = layer_at(model.visual.blocks, i)(jnp.asarray(x), rope, mask)
    assert unit_error(ours[valid], expected) < TOLERANCE


def test_patch_embedding_with_positions():
  """The first block's input: pixels normalised on the device, learned positions interpolated."""
  model, _, _, vision, reference = setup()
  valid = vision.patch_segments > 0
  expected = reference.vision_blocks[0][0]

  def first_input(vision: VisionInputs) -> jax.Array:
    embedded = model.visual.patch_embed(jnp.asarray(vision.pixel_values), jnp.float32)
    return (embedded + model.visual._position_embeddings(vision))[valid]

  assert unit_error(first_input(vision), expected) < TOLERANCE
  nearest = vision.pos_embed_weight == vision.pos_embed_weight.max(axis=-1, keepdims=True)
  rounded = vision.replace(pos_embed_weight=nearest.astype(np.float32))
  assert unit_error(first_input(rounded), expected) > WIDE
  shifted = vision.replace(pixel_values=vision.pixel_values ^ 1)  # one level off
  assert unit_error(first_input(shifted), expected) > WIDE


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_norms_have_their_eps(name):
  """At a variance near eps, where 1e-5 instead of 1e-6 shows."""
  model, torch_model, _, _, _ = setup()
  x = 2e-3 * np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
  ours = getattr(layer_at(model.visual.blocks, 1), name)
  theirs = getattr(torch_model.model.visual.blocks[1], name)(torch.tensor(x))
  assert unit_error(ours(jnp.asarray(x)), theirs) < TOLERANCE
  ours.eps = 1e-5
  assert unit_error(ours(jnp.asarray(x)), theirs) > WIDE


def half_pixel_taps(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """What `align_corners=False` would take."""
  source = ((np.arange(size, dtype=np.float32) + 0.5) * side / size - 0.5).clip(0, side - 1)
  low = np.floor(source)
  index = np.stack([low, np.minimum(low + 1, side - 1)], axis=-1).astype(np.int32)
  return index, np.stack([1 - (source - low), source - low], axis=-1)


def test_half_pixel_positions_fail(monkeypatch):
  model, _, _, vision, _ = setup()
  monkeypatch.setattr(positions_module, "_taps", half_pixel_taps)
  layouts = [vision_layout(grids, NUM_PATCHES, 2, POSITION_SIDE) for grids in GRIDS]
  changed = vision.replace(
    pos_embed_index=np.stack([layout.pos_embed_index for layout in layouts]),
    pos_embed_weight=np.stack([layout.pos_embed_weight for layout in layouts]),
  )
  assert tower_error(model.visual, changed) > WIDE


def test_exchanged_rows_and_columns_of_the_rope_fail():
  model, _, _, vision, _ = setup()
  changed = vision.replace(patch_positions=vision.patch_positions[..., ::-1].copy())
  assert tower_error(model.visual, changed) > WIDE


def test_attention_across_the_images_of_a_sample_fails():
  model, _, _, vision, _ = setup()
  changed = vision.replace(patch_segments=(vision.patch_segments > 0).astype(np.int32))
  assert tower_error(model.visual, changed) > WIDE


@pytest.mark.parametrize(
  ("name", "wrong"), [("gelu_exact", "gelu_tanh"), ("gelu_tanh", "gelu_exact")]
)
def test_the_other_gelu_fails(monkeypatch, name, wrong):
  """Mergers use erf, blocks tanh."""
  model, _, _, vision, _ = setup()
  monkeypatch.setattr(vision_module, name, getattr(vision_module, wrong))
  assert tower_error(model.visual, vision) > 10 * TOLERANCE


def test_taps_one_block_late_fail():
  model, _, _, vision, _ = setup()
  whole = model.visual.config
  model.visual.config = dataclasses.replace(whole, deepstack_indexes=(1, 3))
  late = tower_error(model.visual, vision)
  model.visual.config = whole
  assert late > WIDE


def test_deepstack_norm_before_the_fold_fails(monkeypatch):
  """The main merger normalises patches, the DeepStack ones merged tokens."""
  model, _, _, vision, _ = setup()
  whole = PatchMerger.__call__

  def norm_of_patches(self: PatchMerger, x: jax.Array) -> jax.Array:
    if not self.norm_after_fold:
      return whole(self, x)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    x = ((x - mean) / jnp.sqrt(var + 1e-6)).reshape(x.shape[0], -1, self.folded)
    x = x * self.norm.weight[...] + self.norm.bias[...]
    return self.linear_fc2(vision_module.gelu_exact(self.linear_fc1(x)))

  monkeypatch.setattr(PatchMerger, "__call__", norm_of_patches)
  assert tower_error(model.visual, vision) > WIDE
