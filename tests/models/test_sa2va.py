"""The join of Qwen3-VL and SAM 2: which hidden states prompt which masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from vrt_jax.models.sa2va import Sa2VA, Sa2VAOutput, TextHiddenFcs, gather_positions

POST_NORM = dataclasses.replace(tiny.MODEL, seg_hidden="post_norm")


def hidden_states() -> jax.Array:
  return jnp.asarray(3 * np.random.default_rng(0).normal(size=(2, 4, 32)), jnp.float32)


def test_text_hidden_fcs_is_linear_relu_linear():
  fcs = tiny.loaded().model.text_hidden_fcs
  x = np.asarray(hidden_states())
  w1, b1, w2, b2 = (np.asarray(p[...]) for f in (fcs.fc1, fcs.fc2) for p in (f.weight, f.bias))
  expected = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
  np.testing.assert_allclose(fcs(hidden_states()), expected, rtol=1e-4, atol=1e-5)
  assert TextHiddenFcs(32, 8, nnx.Rngs(0))(x).shape == (2, 4, 8)


def test_pre_norm_and_post_norm_prompts_equal_their_definitions():
  pre, post = tiny.random_model(), tiny.random_model(POST_NORM)
  hidden = hidden_states()
  rms = np.sqrt(np.mean(np.asarray(hidden) ** 2, axis=-1, keepdims=True) + 1e-6)
  normed = np.asarray(hidden) / rms * np.asarray(pre.qwen.language_model.norm.weight[...])
  got = pre.language_embeddings(hidden), post.language_embeddings(hidden)
  np.testing.assert_allclose(got[0], pre.text_hidden_fcs(hidden), rtol=1e-6)
  np.testing.assert_allclose(got[1], pre.text_hidden_fcs(jnp.asarray(normed)), rtol=1e-4, atol=1e-5)
  assert np.abs(np.asarray(got[0] - got[1])).max() > 0.1


def test_gather_positions():
  hidden = jnp.arange(12.0).reshape(2, 3, 2)
  got = gather_positions(hidden, jnp.asarray([[2, 0, 2], [1, 1, 0]]))
  assert got.tolist() == [[[4, 5], [0, 1], [4, 5]], [[8, 9], [8, 9], [6, 7]]]


@functools.cache
def forward(seg_hidden: str) -> tuple[Sa2VAOutput, jax.Array, jax.Array]:
  """(output, pre-norm hidden states, masks from those at [SEG]), compiled together."""
  model = tiny.random_model(dataclasses.replace(tiny.MODEL, seg_hidden=seg_hidden))

  @nnx.jit
  def run(model: Sa2VA, batch):
    hidden = model.qwen(batch.text, batch.vision)
    at_seg = gather_positions(hidden, batch.targets.seg_positions)
    features = model.sam2.encode_image(batch.grounding_image)
    masks = model.sam2.decode_masks(features, model.text_hidden_fcs(at_seg)).low_res_masks
    return model(batch), hidden, masks

  return run(model, tiny.batch())


def test_output_shapes_and_dtypes():
  out, hidden, _ = forward("pre_norm")
  assert out.hidden_states.shape == hidden.shape == (2, 384, 32)
  assert out.masks.low_res_masks.shape == (2, 2, 16, 16)
  assert out.masks.low_res_masks.dtype == jnp.float32
  assert out.masks.iou_pred.shape == (2, 2)
  norm = tiny.loaded().model.qwen.language_model.final_norm
  np.testing.assert_allclose(out.hidden_states, norm(hidden), rtol=1e-4, atol=1e-4)


def test_masks_come_from_the_states_before_the_final_norm():
  out, _, from_pre_norm = forward("pre_norm")
  np.testing.assert_allclose(out.masks.low_res_masks, from_pre_norm, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_post_norm_masks_differ():
  out, _, from_pre_norm = forward("post_norm")
  assert np.abs(np.asarray(out.masks.low_res_masks - from_pre_norm)).max() > 1e-2


def test_no_parameter_of_sa2va_is_left_out_of_the_tree():
  model = tiny.loaded().model
  top = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))}
  assert top == {"qwen", "text_hidden_fcs", "sam2"}
  assert model.dtype == jnp.float32
  bf16 = dataclasses.replace(tiny.MODEL, compute_dtype="bfloat16")
  assert nnx.eval_shape(lambda: Sa2VA(bf16, nnx.Rngs(0))).dtype == jnp.bfloat16


def test_widths_that_do_not_fit_raise():
  vision = dataclasses.replace(tiny.MODEL.vision, out_hidden_size=48)
  with pytest.raises(ValueError, match=r"vision.out_hidden_size 48 differs from text.hidden_size"):
    Sa2VA(dataclasses.replace(tiny.MODEL, vision=vision), nnx.Rngs(0))
