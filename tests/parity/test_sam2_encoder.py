"""SAM 2's image encoder against transformers: every Hiera stage, every pyramid level.

Controls run without jit: their operations are compiled once for all of them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity.errors import channels_last, max_error, unit_error
from tests.parity.sam2_case import (
  CONFIG,
  channels_first,
  encode,
  images,
  our_model,
  torch_embeddings,
  torch_levels,
  torch_model,
  torch_stages,
)
from tests.parity.sam2_weights import load_torch, random_torch_model
from vrt_jax.models.layers import gelu_tanh
from vrt_jax.models.sam2 import hiera, neck
from vrt_jax.models.sam2.model import IMAGENET_MEAN, IMAGENET_STD, Sam2, normalize_image
from vrt_jax.models.sam2.neck import FpnNeck
from vrt_jax.ops.resize import resize_bilinear

TOLERANCE = 1e-5
WIDE = 100 * TOLERANCE


def stage_errors(model: Sam2) -> list[float]:
  """Our trunk's four maps against transformers'."""
  stages = model.image_encoder.trunk(jnp.asarray(images()))
  return [unit_error(a, b) for a, b in zip(stages, torch_stages(), strict=True)]


def level_errors(model: Sam2) -> list[float]:
  """Our neck on transformers' trunk maps, so that only the neck can differ."""
  levels = model.image_encoder.neck([jnp.asarray(stage) for stage in torch_stages()])
  return [unit_error(a, b) for a, b in zip(levels, torch_levels(), strict=True)]


def test_the_four_stages():
  assert [stage.shape for stage in torch_stages()] == [
    (2, 32, 32, 16),
    (2, 16, 16, 32),
    (2, 8, 8, 64),
    (2, 4, 4, 128),
  ]
  assert min(stage.std() for stage in torch_stages()) > 0.5
  assert max(stage_errors(our_model())) < TOLERANCE


def test_the_three_levels_of_the_pyramid():
  assert [level.shape[1] for level in torch_levels()] == [32, 16, 8]
  assert min(level.std() for level in torch_levels()) > 0.1
  assert max(level_errors(our_model())) < TOLERANCE


def test_image_features_end_to_end():
  """Compiled: strides 4 and 8 through conv_s0 and conv_s1, stride 16 with no_mem_embed."""
  model = our_model()
  features = encode(model, images())
  decoder = model.mask_decoder
  ours = [decoder.conv_s0(features.stride4), decoder.conv_s1(features.stride8), features.stride16]
  for a, b in zip(ours, torch_embeddings(torch_model()), strict=True):
    assert unit_error(a, channels_last(b)) < TOLERANCE


def test_divisible_windows_as_in_the_released_models():
  """Another set of sizes: no padding, two global blocks, another seed."""
  config = dataclasses.replace(CONFIG, window_spec=(8, 4, 4, 2), global_attention_blocks=(4, 5))
  theirs = random_torch_model(config, seed=4)
  with torch.no_grad():
    levels = theirs.vision_encoder(channels_first(images())).fpn_hidden_states
  ours = load_torch(config, theirs.state_dict()).image_encoder(jnp.asarray(images()))
  for a, b in zip(ours, levels, strict=True):
    assert unit_error(a, channels_last(b)) < TOLERANCE


def test_positions():
  model, backbone = our_model(), torch_model().vision_encoder.backbone
  ours = model.image_encoder.trunk.positions((32, 32))
  assert unit_error(ours, backbone._get_pos_embed((32, 32))[0]) < TOLERANCE


def test_bytes_are_normalised_in_float32():
  """The grounding image of training; bfloat16 arithmetic would be up to 0.025 off."""
  image = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), np.uint8)
  mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
  theirs = (torch.tensor(image) / 255 - mean) / std
  assert max_error(normalize_image(jnp.asarray(image)), theirs) < 1e-6
  low = (torch.tensor(image).bfloat16() / 255 - mean.bfloat16()) / std.bfloat16()
  assert max_error(normalize_image(jnp.asarray(image)), low.float()) > 1e-3


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_norms_have_their_eps(name):
  """At a variance near eps, where 1e-5 instead of 1e-6 shows."""
  x = 2e-3 * np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
  ours = getattr(our_model().image_encoder.trunk.blocks[2], name)
  theirs = torch_model().vision_encoder.backbone.blocks[2].get_submodule(f"layer_{name}")
  assert unit_error(ours(jnp.asarray(x)), theirs(torch.tensor(x))) < TOLERANCE
  ours.eps = 1e-5
  assert unit_error(ours(jnp.asarray(x)), theirs(torch.tensor(x))) > WIDE


def _tanh_gelu(model, monkeypatch):
  for block in model.image_encoder.trunk.blocks:
    block.mlp.activation = gelu_tanh


def _own_window_in_the_first_block_of_a_stage(model, monkeypatch):
  model.image_encoder.trunk.blocks[1].window = CONFIG.window_spec[1]


def _windows_in_the_global_block(model, monkeypatch):
  model.image_encoder.trunk.blocks[4].window = CONFIG.window_spec[2]


def _windows_filled_with_their_edge(model, monkeypatch):
  def pad(x, widths):
    return jnp.pad(x, widths, mode="edge")

  whole = hiera.partition_windows

  def filled(x, window):
    short = (0, -x.shape[1] % window), (0, -x.shape[2] % window)
    return whole(pad(x, ((0, 0), *short, (0, 0))), window)

  monkeypatch.setattr(hiera, "partition_windows", filled)


def _mean_pooling(model, monkeypatch):
  def mean_pool(x):
    b, y, x_size, d = x.shape
    return x.reshape(b, y // 2, 2, x_size // 2, 2, d).mean(axis=(2, 4))

  monkeypatch.setattr(hiera, "max_pool_2x2", mean_pool)


def _shortcut_without_norm(model, monkeypatch):
  """maxpool(proj(x)) in place of maxpool(proj(norm1(x))): norm1 undone by its own statistics."""
  block = model.image_encoder.trunk.blocks[1]
  proj, norm, seen = block.proj, block.norm1, []
  monkeypatch.setattr(block, "norm1", lambda x: (seen.append(x), norm(x))[1])
  monkeypatch.setattr(block, "proj", lambda h: proj(seen[0]))


def _bilinear_background(model, monkeypatch):
  monkeypatch.setattr(hiera, "resize_bicubic", resize_bilinear)


def _no_window_embedding(model, monkeypatch):
  window = model.image_encoder.trunk.pos_embed_window
  window[...] = jnp.zeros_like(window[...])


def _patches_one_pixel_off(model, monkeypatch):
  weight = model.image_encoder.trunk.patch_embed.weight
  weight[...] = jnp.roll(weight[...], 1, axis=3)


@pytest.mark.parametrize(
  "damage",
  [
    _tanh_gelu,
    _own_window_in_the_first_block_of_a_stage,
    _windows_in_the_global_block,
    _windows_filled_with_their_edge,
    _mean_pooling,
    _shortcut_without_norm,
    _bilinear_background,
    _no_window_embedding,
    _patches_one_pixel_off,
  ],
)
def test_damaged_trunk_fails(monkeypatch, damage):
  model = our_model()
  damage(model, monkeypatch)
  assert max(stage_errors(model)) > 10 * TOLERANCE


def _bilinear_top_down(monkeypatch):
  def upsample(x):
    size = (2 * x.shape[1], 2 * x.shape[2])
    return jnp.moveaxis(resize_bilinear(jnp.moveaxis(x, -1, 1), size), 1, -1)

  monkeypatch.setattr(neck, "upsample_nearest_2x", upsample)


def _top_down_into_stride_8(monkeypatch):
  whole = FpnNeck.__call__

  def further(self, maps):
    stride4, stride8, stride16 = whole(self, maps)
    return [stride4, stride8 + neck.upsample_nearest_2x(stride16), stride16]

  monkeypatch.setattr(FpnNeck, "__call__", further)


def _no_top_down(monkeypatch):
  monkeypatch.setattr(neck, "upsample_nearest_2x", lambda x: 0.0)


@pytest.mark.parametrize("damage", [_bilinear_top_down, _top_down_into_stride_8, _no_top_down])
def test_damaged_neck_fails(monkeypatch, damage):
  damage(monkeypatch)
  assert max(level_errors(our_model())) > WIDE


def test_damaged_features_fail():
  """No no_mem_embed on stride 16; conv_s0 and conv_s1 without their biases."""
  model = our_model()
  decoder = model.mask_decoder
  for parameter in (model.no_mem_embed, decoder.conv_s0.bias, decoder.conv_s1.bias):
    parameter[...] = jnp.zeros_like(parameter[...])
  stride4, stride8, stride16 = (jnp.asarray(level) for level in torch_levels())
  ours = [decoder.conv_s0(stride4), decoder.conv_s1(stride8), stride16 + model.no_mem_embed[0, 0]]
  for a, b in zip(ours, torch_embeddings(torch_model()), strict=True):
    assert unit_error(a, channels_last(b)) > WIDE
