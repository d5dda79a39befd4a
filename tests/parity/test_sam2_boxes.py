"""One mask a box equals transformers' Sam2Model in float32, with controls that must not.

The model is that of sam2_case with two changes that make every branch count: which multimask output
is best depends on the box, and mask 0 is stable for some boxes only.
"""

import copy
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Sam2Model

from tests.parity.errors import max_error, unit_error
from tests.parity.sam2_case import (
  CONFIG,
  Decoded,
  channels_first,
  images,
  torch_decode,
  torch_features,
  torch_model,
)
from tests.parity.sam2_weights import balance_iou_head, load_torch
from vrt_jax.models.sam2 import model as sam2_model
from vrt_jax.models.sam2 import prompt_encoder
from vrt_jax.models.sam2.model import ImageFeatures, MaskOutput, Sam2, stability
from vrt_jax.models.sam2.prompt_encoder import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PromptEncoder

LOGITS = 1e-4
WIDE = 100 * LOGITS
GAIN = 20.0
BOXES = np.array(
  [
    [[10, 20, 70, 90], [0, 0, 128, 64], [5.5, 5.25, 9, 9], [60, 40, 126.5, 127]],
    [[30, 1, 44, 120], [80, 80, 100, 96], [2, 60, 120, 70], [0, 0, 128, 128]],
  ],
  np.float32,
)
"""x0, y0, x1, y1 of four boxes an image, in pixels of the input."""


def _all_masks(model: Sam2Model) -> Decoded:
  """Mask 0 and the multimask outputs of the boxes, without a choice."""
  model = copy.deepcopy(model)
  model.mask_decoder.dynamic_multimask_via_stability = False
  with torch.no_grad():
    sparse, dense = model.get_prompt_embeddings(input_boxes=torch.tensor(BOXES))
  return torch_decode(model, sparse, dense, torch.float32)


@functools.cache
def box_model() -> Sam2Model:
  """The model with its default choice of one mask. Nobody changes it."""
  model = copy.deepcopy(torch_model())
  model.mask_decoder.dynamic_multimask_via_stability = True
  balance_iou_head(model, torch.from_numpy(_all_masks(model)[1][..., 1:]))
  with torch.no_grad():  # mask 0 is linear in its vector: a steeper one is more stable
    last = model.mask_decoder.output_hypernetworks_mlps[0].proj_out
    last.weight.mul_(GAIN)
    last.bias.mul_(GAIN)
  return model


@functools.cache
def torch_masks() -> Decoded:
  """Sam2Model.forward with multimask_output False: masks, IoUs and object scores, one a box."""
  with torch.no_grad():
    out = box_model()(
      pixel_values=channels_first(images()),
      input_boxes=torch.tensor(BOXES),
      multimask_output=False,
    )
  masks, iou, scores = out.pred_masks[:, :, 0], out.iou_scores[:, :, 0], out.object_score_logits
  return masks.numpy(), iou.numpy(), scores[..., 0].numpy()


@nnx.jit
def decode_boxes(model: Sam2, features: ImageFeatures, boxes: np.ndarray) -> MaskOutput:
  """Our boxes to one mask each, compiled."""
  return model.decode_boxes(features, boxes)


def mask_error(out: MaskOutput) -> float:
  return unit_error(out.low_res_masks, torch_masks()[0])


def our_model() -> Sam2:
  """A fresh copy, which controls may damage."""
  return load_torch(CONFIG, box_model().state_dict())


def test_one_mask_a_box():
  masks, iou, scores = torch_masks()
  everything, all_ious, _ = _all_masks(box_model())
  single = (masks == everything[:, :, 0]).all(axis=(-2, -1))
  assert 1 < single.sum() < single.size - 1  # stable masks and others
  best = all_ious[..., 1:].argmax(axis=-1)
  assert len(np.unique(best[~single])) > 1
  assert masks.std() > 0.1
  out = decode_boxes(our_model(), torch_features(), BOXES)
  assert out.low_res_masks.dtype == jnp.float32
  assert mask_error(out) < LOGITS
  assert max_error(out.iou_pred, iou) < LOGITS
  assert max_error(out.object_score_logits, scores) < LOGITS
  assert unit_error(everything[:, :, 0], masks) > WIDE  # mask 0 whatever its stability
  multimask = np.take_along_axis(everything[:, :, 1:], best[..., None, None, None], axis=2)
  assert unit_error(multimask[:, :, 0], masks) > WIDE


def test_other_boxes_and_padding_change_nothing():
  out = decode_boxes(our_model(), torch_features(), BOXES)
  padded = decode_boxes(our_model(), torch_features(), BOXES * (np.arange(4) == 2)[:, None])
  assert max_error(padded.low_res_masks[:, 2], out.low_res_masks[:, 2]) < LOGITS
  assert max_error(padded.low_res_masks[:, 1], out.low_res_masks[:, 1]) > WIDE


def _swapped_corner_labels(monkeypatch):
  swapped = {"BOX_TOP_LEFT": BOX_BOTTOM_RIGHT, "BOX_BOTTOM_RIGHT": BOX_TOP_LEFT}
  for name, value in swapped.items():
    monkeypatch.setattr(prompt_encoder, name, value)


def _corners_of_pixels(monkeypatch):
  whole = PromptEncoder.embed_boxes
  monkeypatch.setattr(PromptEncoder, "embed_boxes", lambda self, boxes: whole(self, boxes - 0.5))


def _without_the_closing_token(monkeypatch):
  whole = PromptEncoder.embed_boxes
  monkeypatch.setattr(PromptEncoder, "embed_boxes", lambda self, b: whole(self, b)[:, :, :2])


def _rows_before_columns(monkeypatch):
  whole = PromptEncoder.embed_boxes
  order = np.array([1, 0, 3, 2])
  monkeypatch.setattr(PromptEncoder, "embed_boxes", lambda self, b: whole(self, b[..., order]))


def _another_stability(monkeypatch):
  monkeypatch.setattr(sam2_model, "STABILITY_DELTA", 0.2)


@pytest.mark.parametrize(
  "damage",
  [
    _swapped_corner_labels,
    _corners_of_pixels,
    _without_the_closing_token,
    _rows_before_columns,
    _another_stability,
  ],
)
def test_damaged_box_prompts_fail(monkeypatch, damage):
  damage(monkeypatch)
  assert mask_error(our_model().decode_boxes(torch_features(), jnp.asarray(BOXES))) > 10 * LOGITS


def test_stability_of_masks():
  masks = jnp.asarray([[[1.0, 0.06], [0.04, -1.0]], [[0.0, -0.04], [-1.0, -1.0]], [[-1.0] * 2] * 2])
  theirs = box_model().mask_decoder._get_stability_scores(torch.from_numpy(np.array(masks)))
  np.testing.assert_allclose(stability(masks), theirs)
  np.testing.assert_allclose(theirs, [2 / 3, 0, 1])
