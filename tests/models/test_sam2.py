"""SAM 2: batching, gradients, dtypes, errors, and Hiera-L against the released checkpoint."""

import ast
import csv
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vrt_jax.config import Sam2Config
from vrt_jax.models.sam2 import hiera
from vrt_jax.models.sam2.hiera import merge_windows, partition_windows
from vrt_jax.models.sam2.model import Sam2
from vrt_jax.models.sam2.prompt_encoder import Buffer

CONFIG = Sam2Config(
  image_size_px=64,
  stages=(1, 1, 1, 1),
  global_attention_blocks=(2,),
  window_spec=(8, 4, 4, 2),
  d_model=32,
  decoder_mlp_dim=48,
)
HIERA_L = Sam2Config(
  image_size_px=1024,
  embed_dim=144,
  num_heads=2,
  stages=(2, 6, 36, 4),
  global_attention_blocks=(23, 33, 43),
  window_spec=(8, 4, 16, 8),
  d_model=256,
  decoder_num_heads=8,
  decoder_mlp_dim=2048,
  iou_head_hidden_dim=256,
)


@pytest.fixture(scope="module")
def model():
  """Random weights without compiling the initialisers."""
  rng = np.random.default_rng(7)
  graph, state = nnx.split(nnx.eval_shape(lambda: Sam2(CONFIG, nnx.Rngs(0))))

  def fill(leaf):
    scale = 0.1 if leaf.ndim == 1 else np.prod(leaf.shape[1:]) ** -0.5
    return jnp.asarray((leaf.ndim == 1) + scale * rng.normal(size=leaf.shape), leaf.dtype)

  return nnx.merge(graph, jax.tree.map(fill, state))


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def language():
  return jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 32)), jnp.float32)


@functools.partial(nnx.jit, static_argnames="dtype")
def _encode(model, image, dtype=jnp.float32):
  return model.encode_image(image, dtype)


@nnx.jit
def _decode(model, features, language):
  return model.decode_masks(features, language)


@nnx.jit
def _decode_prompts(model, features, sparse, dense=None):
  return model.decode_prompts(features, sparse, dense)


def _predict(model, image, language):
  return _decode(model, _encode(model, image), language)


def _assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_shapes(model, image, language):
  features = _encode(model, image)
  assert features.stride4.shape == (2, 16, 16, 32)
  assert features.stride8.shape == (2, 8, 8, 32)
  assert features.stride16.shape == (2, 4, 4, 32)
  out = _predict(model, image, language)
  assert out.low_res_masks.shape == (2, 3, 16, 16)
  assert out.iou_pred.shape == out.object_score_logits.shape == (2, 3)


def test_objects_together_equal_one_at_a_time(model, image, language):
  together = _predict(model, image, language)
  single = [_predict(model, image, language[:, i : i + 1]) for i in range(3)]
  _assert_equal(together, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *single))
  assert np.abs(together.low_res_masks[:, 0] - together.low_res_masks[:, 1]).max() > 1e-3


def test_images_together_equal_one_at_a_time(model, image, language):
  together = _predict(model, image, language)
  single = [_predict(model, image[i : i + 1], language[i : i + 1]) for i in range(2)]
  _assert_equal(together, jax.tree.map(lambda *x: jnp.concatenate(x, axis=0), *single))


def test_shared_cells_equal_an_explicit_dense_prompt(model, image, language):
  """The no-mask embedding as a dense prompt an object takes the unshared road to the same masks."""
  features = _encode(model, image)
  sparse = model.language_prompt(language)
  no_mask = model.prompt_encoder.no_mask_embed.weight[0]
  dense = jnp.broadcast_to(no_mask, (2, 3, 4, 4, 32))
  _assert_equal(
    _decode_prompts(model, features, sparse), _decode_prompts(model, features, sparse, dense)
  )


def test_chosen_mask_has_the_best_predicted_iou(model, image, language):
  features = _encode(model, image)
  every = _decode_prompts(model, features, model.language_prompt(language))
  out = _decode(model, features, language)
  best = np.argmax(every.iou_pred[:, :, 1:], axis=-1)
  for b, m in np.ndindex(2, 3):
    np.testing.assert_allclose(
      out.low_res_masks[b, m], every.masks[b, m, 1 + best[b, m]], atol=1e-5
    )
  np.testing.assert_allclose(out.iou_pred, every.iou_pred[:, :, 1:].max(-1), atol=1e-6)


def test_bytes_are_normalised(model, image):
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  ready = jnp.asarray((image / 255.0 - mean) / std, jnp.float32)
  _assert_equal(_encode(model, image), _encode(model, ready))


def test_gradients_reach_trunk_and_projections_but_not_the_fourier_matrix(model, image, language):
  def loss(model):
    return jnp.mean(model.decode_masks(model.encode_image(image), language).low_res_masks ** 2)

  grads = nnx.jit(nnx.grad(loss))(model)
  blocks = nnx.state(grads.image_encoder.trunk.blocks)
  for path, leaf in nnx.to_flat_state(blocks):
    assert np.all(np.isfinite(leaf[...])), path
  weights = [leaf for path, leaf in nnx.to_flat_state(blocks) if path[-1] == "weight"]
  assert all(np.any(w[...]) for w in weights)
  decoder = grads.mask_decoder
  for layer in (decoder.conv_s0, decoder.conv_s1, decoder.output_upscaling[0]):
    assert np.any(layer.weight[...])
  assert not np.any(decoder.pred_obj_score_head.layers[0].weight[...])
  matrix = grads.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
  assert isinstance(matrix, Buffer)
  assert not np.any(matrix[...])


def test_bfloat16_features_give_float32_logits(model, image, language):
  features = _encode(model, image, dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(features)} == {jnp.dtype(jnp.bfloat16)}
  out = _decode(model, features, language)
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
  exact = _predict(model, image, language)
  np.testing.assert_allclose(out.iou_pred, exact.iou_pred, atol=0.05)


@pytest.mark.parametrize(("size", "window"), [((8, 8), 4), ((7, 10), 4), ((5, 3), 6)])
def test_windows_round_trip(size, window):
  x = jnp.asarray(np.random.default_rng(2).normal(size=(2, *size, 3)))
  windows = partition_windows(x, window)
  assert windows.shape[1:] == (window, window, 3)
  np.testing.assert_array_equal(merge_windows(windows, size), x)


def test_blocks_in_a_loop_give_what_they_give_one_by_one(monkeypatch):
  config = dataclasses.replace(CONFIG, stages=(1, 3, 2, 1))  # block 2 looks at the whole map
  trunk = hiera.Hiera(config, nnx.Rngs(0))
  image = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64, 64, 3)), jnp.float32)
  one_by_one = jax.jit(lambda x: trunk(x))(image)
  monkeypatch.setattr(hiera, "on_one_cpu", lambda: False)
  looped = jax.jit(lambda x: trunk(x))(image)
  for a, b in zip(one_by_one, looped, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert float(jnp.abs(looped[-1]).max()) > 0.1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_size_px": 100}, "multiple of 32"),
    ({"window_spec": (7, 4, 4, 2)}, "does not divide"),
    ({"window_spec": (8, 4, 7, 2)}, "must be even"),
    ({"stages": (1, 1, 1)}, "four entries"),
  ],
)
def test_sizes_that_do_not_fit_raise(change, message):
  with pytest.raises(ValueError, match=message):
    Sam2(dataclasses.replace(CONFIG, **change), nnx.Rngs(0))


CHECKPOINT_PREFIX = "grounding_encoder.sam2_model."
ROOMS = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
RENAMES = [
  (r"^sam_", ""),
  (r"patch_embed\.proj\.", "patch_embed."),
  (r"(neck\.convs\.\d)\.conv\.", r"\1."),
  (r"output_upscaling\.3\.", "output_upscaling.2."),
  (r"mask_downscaling\.3\.", "mask_downscaling.2."),
  (r"mask_downscaling\.4\.", "mask_downscaling.3."),
  (r"mask_downscaling\.6\.", "mask_downscaling.4."),
]


def _checkpoint_shapes(path) -> dict[str, tuple[int, ...]]:
  shapes = {}
  with path.open() as file:
    for key, shape in csv.reader(file, delimiter="\t"):
      name = key.removeprefix(CHECKPOINT_PREFIX)
      if name == key or not name.startswith(ROOMS):
        continue
      for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
      shape = tuple(ast.literal_eval(shape))
      shapes[name] = shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
  return shapes


def test_hiera_l_has_the_shapes_of_the_checkpoint(shared_data):
  wanted = _checkpoint_shapes(shared_data / "keys_4b.tsv")
  abstract = nnx.eval_shape(lambda: Sam2(HIERA_L, nnx.Rngs(0)))
  leaves = nnx.to_flat_state(nnx.state(abstract))
  ours = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in leaves}
  assert ours == wanted
  assert len(ours) == 743
  assert sum(int(np.prod(shape)) for shape in ours.values()) == 216_925_121


def test_hiera_l_widths_at_1024_pixels():
  config = dataclasses.replace(HIERA_L, stages=(1, 1, 1, 1), global_attention_blocks=(2,))
  abstract = nnx.eval_shape(lambda: Sam2(config, nnx.Rngs(0)))
  image = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.uint8)
  language = jax.ShapeDtypeStruct((1, 5, 256), jnp.float32)
  out = nnx.eval_shape(_predict, abstract, image, language)
  assert out.low_res_masks.shape == (1, 5, 256, 256)
