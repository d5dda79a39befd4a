"""SAM 2 equals transformers' Sam2Model in float32, with controls that must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity.sam2_weights import load_torch, random_torch_model
from vrt_jax.config import Sam2Config
from vrt_jax.models.layers import gelu_tanh
from vrt_jax.models.sam2 import mask_decoder
from vrt_jax.models.sam2.model import AllMasks, ImageFeatures, MaskOutput, Sam2

# At 128 pixels the 8x8 map of stage 2 is not divisible by its window of 6: padding is exercised.
CONFIG = Sam2Config(image_size_px=128, d_model=32, decoder_mlp_dim=48, iou_head_hidden_dim=24)
ATOL = 1e-4


@pytest.fixture(scope="module")
def torch_model():
  return random_torch_model(CONFIG)


@pytest.fixture
def model(torch_model):
  return load_torch(CONFIG, torch_model.state_dict())


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(1).normal(size=(2, 128, 128, 3)).astype(np.float32)


def _nchw(x):
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


@pytest.fixture(scope="module")
def torch_levels(torch_model, image):
  """Pyramid maps of strides 4, 8, 16, channels last, before any decoder projection."""
  with torch.no_grad():
    levels = torch_model.vision_encoder(_nchw(image)).fpn_hidden_states
  return [level.permute(0, 2, 3, 1).numpy() for level in levels]


@nnx.jit
def _encode(model: Sam2, image) -> ImageFeatures:
  return model.encode_image(image)


@nnx.jit
def _decode(model: Sam2, features, sparse, dense=None) -> AllMasks:
  return model.decode_prompts(features, sparse, dense)


@nnx.jit
def _decode_masks(model: Sam2, features, language) -> MaskOutput:
  return model.decode_masks(features, language)


def _torch_decode(torch_model, image, sparse, dense):
  """Masks, IoU and object scores of all four mask tokens; one image's dense prompt is shared."""
  embeddings = torch_model.get_image_embeddings(_nchw(image))
  position = torch_model.get_image_wide_positional_embeddings()
  parts = []
  for multimask in (False, True):
    with torch.no_grad():
      masks, iou, _, score = torch_model.mask_decoder(
        image_embeddings=embeddings[-1],
        image_positional_embeddings=position.repeat(len(image), 1, 1, 1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        high_resolution_features=embeddings[:-1],
      )
    parts.append((masks, iou))
  masks, iou = (torch.cat(pair, dim=2).numpy() for pair in zip(*parts, strict=True))
  return masks, iou, score[..., 0].numpy()


def _worst(ours: AllMasks, theirs) -> float:
  pairs = zip((ours.masks, ours.iou_pred, ours.object_score_logits), theirs, strict=True)
  return max(np.abs(np.asarray(a) - b).max() for a, b in pairs)


def _encoder_error(model, image, levels) -> float:
  features = _encode(model, image)
  ours = [features.stride4, features.stride8, features.stride16 - model.no_mem_embed[0, 0]]
  return max(np.abs(np.asarray(a) - b).max() for a, b in zip(ours, levels, strict=True))


def _language(seed=3):
  return np.random.default_rng(seed).normal(size=(2, 3, CONFIG.d_model)).astype(np.float32)


def _language_torch(torch_model, image, embeddings):
  """The reference's prompt by hand: one empty point, padded to two, then the embedding."""
  points, labels = torch.zeros(2, 3, 1, 2), -torch.ones(2, 3, 1, dtype=torch.int32)
  with torch.no_grad():
    empty, dense = torch_model.get_prompt_embeddings(input_points=points, input_labels=labels)
  assert empty.shape == (2, 3, 2, CONFIG.d_model)
  sparse = torch.cat([empty, torch.from_numpy(embeddings)[:, :, None]], dim=2)
  return _torch_decode(torch_model, image, sparse, dense)


def test_pyramid(model, image, torch_levels):
  assert min(np.std(level) for level in torch_levels) > 0.1
  assert _encoder_error(model, image, torch_levels) < ATOL


def test_tanh_gelu_in_the_trunk_fails(model, image, torch_levels):
  for block in model.image_encoder.trunk.blocks:
    block.mlp.activation = gelu_tanh
  assert _encoder_error(model, image, torch_levels) > 5 * ATOL


def test_own_window_in_the_first_block_of_a_stage_fails(model, image, torch_levels):
  model.image_encoder.trunk.blocks[1].window = CONFIG.window_spec[1]
  assert _encoder_error(model, image, torch_levels) > 100 * ATOL


def test_no_window_embedding_fails(model, image, torch_levels):
  window = model.image_encoder.trunk.pos_embed_window
  window[...] = jnp.zeros_like(window[...])
  assert _encoder_error(model, image, torch_levels) > 100 * ATOL


def test_image_embeddings(model, torch_model, image):
  features = _encode(model, image)
  theirs = torch_model.get_image_embeddings(_nchw(image))
  decoder = model.mask_decoder
  ours = [decoder.conv_s0(features.stride4), decoder.conv_s1(features.stride8), features.stride16]
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b.permute(0, 2, 3, 1), atol=ATOL)


def test_missing_no_mem_embed_fails(model, torch_model, image):
  model.no_mem_embed[...] = jnp.zeros_like(model.no_mem_embed[...])
  theirs = torch_model.get_image_embeddings(_nchw(image))[-1].permute(0, 2, 3, 1).numpy()
  assert np.abs(np.asarray(_encode(model, image).stride16) - theirs).max() > 100 * ATOL


def test_point_prompt(model, torch_model, image):
  rng = np.random.default_rng(5)
  points = rng.uniform(0, 128, size=(2, 3, 2, 2)).astype(np.float32)
  labels = np.array([[[1, 0], [1, 1], [1, -1]], [[0, 1], [1, -1], [0, 0]]], np.int32)
  with torch.no_grad():
    sparse, dense = torch_model.get_prompt_embeddings(
      input_points=torch.from_numpy(points), input_labels=torch.from_numpy(labels)
    )
  ours = model.prompt_encoder.embed_points(jnp.asarray(points), jnp.asarray(labels))
  np.testing.assert_allclose(ours, sparse, atol=1e-4)
  theirs = _torch_decode(torch_model, image, sparse, dense)
  assert _worst(_decode(model, _encode(model, image), ours), theirs) < ATOL


def test_box_prompt(model, torch_model, image):
  boxes = np.array([[[10, 20, 70, 90], [0, 0, 128, 64]], [[5, 5, 9, 9], [64, 3, 100, 127]]], float)
  with torch.no_grad():
    sparse, dense = torch_model.get_prompt_embeddings(input_boxes=torch.from_numpy(boxes).float())
  ours = model.prompt_encoder.embed_boxes(jnp.asarray(boxes, jnp.float32))
  np.testing.assert_allclose(ours, sparse, atol=1e-4)
  theirs = _torch_decode(torch_model, image, sparse, dense)
  assert _worst(_decode(model, _encode(model, image), ours), theirs) < ATOL


def test_mask_prompt(model, torch_model, image):
  masks = np.random.default_rng(6).normal(size=(2, 1, 32, 32)).astype(np.float32)
  points = torch.full((2, 1, 1, 2), 40.0)
  with torch.no_grad():
    sparse, dense = torch_model.get_prompt_embeddings(
      input_points=points,
      input_labels=torch.ones(2, 1, 1, dtype=torch.int32),
      input_masks=torch.from_numpy(masks),
    )
  ours = model.prompt_encoder.embed_masks(jnp.asarray(masks))
  np.testing.assert_allclose(ours[:, 0], dense.permute(0, 2, 3, 1), atol=1e-4)
  theirs = _torch_decode(torch_model, image, sparse, dense)
  decoded = _decode(model, _encode(model, image), jnp.asarray(sparse.numpy()), ours)
  assert _worst(decoded, theirs) < ATOL


def test_language_prompt(model, torch_model, image):
  embeddings = _language()
  masks, iou, score = _language_torch(torch_model, image, embeddings)
  features = _encode(model, image)
  ours = _decode(model, features, model.language_prompt(jnp.asarray(embeddings)))
  assert _worst(ours, (masks, iou, score)) < ATOL
  assert np.std(masks) > 0.1

  best = iou[:, :, 1:].argmax(axis=-1)
  chosen = np.take_along_axis(masks[:, :, 1:], best[..., None, None, None], axis=2)[:, :, 0]
  out = _decode_masks(model, features, jnp.asarray(embeddings))
  np.testing.assert_allclose(out.low_res_masks, chosen, atol=ATOL)
  np.testing.assert_allclose(out.iou_pred, iou[:, :, 1:].max(axis=-1), atol=ATOL)
  np.testing.assert_allclose(out.object_score_logits, score, atol=ATOL)
  assert out.low_res_masks.dtype == jnp.float32


def _flip(model):
  up = model.mask_decoder.output_upscaling[0]
  up.weight[...] = up.weight[...][:, :, ::-1, ::-1]


def _swap_rows_and_columns(model):
  up = model.mask_decoder.output_upscaling[2]
  up.weight[...] = up.weight[...].swapaxes(2, 3)


def _other_eps_in_upscaling(model):
  model.mask_decoder.output_upscaling[1].eps = 1e-2


def _no_self_positions(model):
  model.mask_decoder.transformer.layers[1].first = True


@pytest.mark.parametrize(
  "damage", [_flip, _swap_rows_and_columns, _other_eps_in_upscaling, _no_self_positions]
)
def test_damaged_decoder_fails(model, torch_model, image, damage):
  embeddings = _language()
  theirs = _language_torch(torch_model, image, embeddings)
  features = _encode(model, image)
  damage(model)
  ours = _decode(model, features, model.language_prompt(jnp.asarray(embeddings)))
  assert _worst(ours, theirs) > 10 * ATOL


def test_one_not_a_point_token_fails(model, torch_model, image):
  embeddings = _language()
  theirs = _language_torch(torch_model, image, embeddings)
  prompt = model.language_prompt(jnp.asarray(embeddings))[:, :, 1:]
  assert _worst(_decode(model, _encode(model, image), prompt), theirs) > 10 * ATOL


def test_mislaid_pixels_fail(model, torch_model, image, monkeypatch):
  """High-resolution features whose rows and columns within a cell are exchanged."""
  monkeypatch.setattr(mask_decoder, "cells_2x", _cells_2x_transposed)
  embeddings = _language()
  theirs = _language_torch(torch_model, image, embeddings)
  prompt = model.language_prompt(jnp.asarray(embeddings))
  features = _encode(model, image)
  ours = nnx.jit(lambda m, *a: m.decode_prompts(*a))(model, features, prompt)
  assert _worst(ours, theirs) > 10 * ATOL


def _cells_2x_transposed(x):
  b, y, x_size, d = x.shape
  x = x.reshape(b, y // 2, 2, x_size // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
  return x.reshape(b, -1, 2, 2, d)


def test_default_geometry_without_padding(image):
  """Divisible windows, as in the released models: another set of sizes against the original."""
  config = dataclasses.replace(CONFIG, window_spec=(8, 4, 4, 2), global_attention_blocks=(4, 5))
  theirs = random_torch_model(config, seed=4)
  ours = load_torch(config, theirs.state_dict())
  with torch.no_grad():
    levels = theirs.vision_encoder(_nchw(image)).fpn_hidden_states
  levels = [level.permute(0, 2, 3, 1).numpy() for level in levels]
  assert _encoder_error(ours, image, levels) < ATOL


def test_gradients_of_the_decoder(model, torch_model, image):
  """d(sum of the three masks' squares) by conv_s0, an upscaling kernel and an attention matrix."""
  embeddings = _language()
  sparse_points = torch.zeros(2, 3, 1, 2), -torch.ones(2, 3, 1, dtype=torch.int32)
  empty, dense = (
    t.detach()
    for t in torch_model.get_prompt_embeddings(
      input_points=sparse_points[0], input_labels=sparse_points[1]
    )
  )
  sparse = torch.cat([empty, torch.from_numpy(embeddings)[:, :, None]], dim=2)
  with torch.no_grad():
    levels = list(torch_model.vision_encoder(_nchw(image)).fpn_hidden_states)
    stride16 = levels[2] + torch_model.no_memory_embedding.reshape(1, -1, 1, 1)
    position = torch_model.get_image_wide_positional_embeddings().repeat(2, 1, 1, 1)
  decoder = torch_model.mask_decoder
  masks = decoder(
    image_embeddings=stride16,
    image_positional_embeddings=position,
    sparse_prompt_embeddings=sparse,
    dense_prompt_embeddings=dense,
    multimask_output=True,
    high_resolution_features=[decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1])],
  )[0]
  names = ["conv_s0", "upscale_conv1", "transformer.layers.0.cross_attn_token_to_image.k_proj"]
  weights = [decoder.get_submodule(name).weight for name in names]
  want = [g.numpy() for g in torch.autograd.grad((masks**2).mean(), weights)]

  features = _encode(model, image)

  def loss(m):
    all_masks = m.decode_prompts(features, m.language_prompt(jnp.asarray(embeddings))).masks
    return jnp.mean(all_masks[:, :, 1:] ** 2)

  grads = nnx.jit(nnx.grad(loss))(model).mask_decoder
  got = [
    grads.conv_s0.weight[...],
    grads.output_upscaling[0].weight[...],
    grads.transformer.layers[0].cross_attn_token_to_image.k_proj.weight[...],
  ]
  for ours, theirs in zip(got, want, strict=True):
    theirs = theirs.reshape(ours.shape)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()))
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(got))
