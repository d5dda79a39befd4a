"""One random SAM 2 in both worlds, two images, and how transformers decodes prompts on them."""

import copy
import functools

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Sam2Model

from tests.parity.errors import as_numpy, channels_last, unit_error
from tests.parity.sam2_weights import balance_iou_head, load_torch, random_torch_model
from vrt_jax.config import Sam2Config
from vrt_jax.models.sam2.model import AllMasks, ImageFeatures, MaskOutput, Sam2

# At 128 pixels the 8x8 map of stage 2 is not divisible by its window of 6: padding is exercised.
CONFIG = Sam2Config(image_size_px=128, d_model=32, decoder_mlp_dim=48, iou_head_hidden_dim=24)

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Masks, IoU and object scores of all four mask tokens."""


@functools.cache
def torch_model() -> Sam2Model:
  """Nobody changes it. Each of its masks is the best one for some prompt."""
  model = random_torch_model(CONFIG)
  iou = torch_decode(model, *torch_language_prompt(model), torch.float32)[1]
  balance_iou_head(model, torch.from_numpy(iou))
  return model


def our_model() -> Sam2:
  """A fresh copy, which controls may damage."""
  return load_torch(CONFIG, torch_model().state_dict())


@functools.cache
def images() -> np.ndarray:
  """Two normalised images, channels last."""
  return np.random.default_rng(1).normal(size=(2, 128, 128, 3)).astype(np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
  """[B, Y, X, C] -> [B, C, Y, X]."""
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


@functools.cache
def torch_stages() -> list[np.ndarray]:
  """The trunk's four maps, channels last."""
  with torch.no_grad():
    out = torch_model().vision_encoder.backbone(channels_first(images()))
  return [as_numpy(stage) for stage in out.intermediate_hidden_states]


@functools.cache
def torch_levels() -> list[np.ndarray]:
  """Pyramid maps of strides 4, 8, 16, channels last, before any decoder projection."""
  with torch.no_grad():
    levels = torch_model().vision_encoder(channels_first(images())).fpn_hidden_states
  return [channels_last(level) for level in levels]


@functools.cache
def torch_embeddings(model: Sam2Model) -> list[torch.Tensor]:
  """conv_s0 and conv_s1 of the pyramid, and stride 16 with the no-memory embedding."""
  with torch.no_grad():
    return model.get_image_embeddings(channels_first(images()))


@functools.cache
def torch_features() -> ImageFeatures:
  """transformers' pyramid as our decoder's input."""
  stride4, stride8, _ = (jnp.asarray(level) for level in torch_levels())
  return ImageFeatures(
    stride4, stride8, jnp.asarray(channels_last(torch_embeddings(torch_model())[2]))
  )


def torch_decode(
  model: Sam2Model,
  sparse: torch.Tensor,
  dense: torch.Tensor,
  dtype: torch.dtype = torch.float64,
) -> Decoded:
  """transformers' mask decoder, run for mask 0 and for the three multimask outputs.

  In float64, since its float32 results are as far from those as our tolerance on some processors.
  """
  decoder = copy.deepcopy(model.mask_decoder).to(dtype)
  embeddings = [level.to(dtype) for level in torch_embeddings(model)]
  position = model.get_image_wide_positional_embeddings().to(dtype)
  parts = []
  for multimask in (False, True):
    with torch.no_grad():
      masks, iou, _, score = decoder(
        image_embeddings=embeddings[-1],
        image_positional_embeddings=position.repeat(len(images()), 1, 1, 1),
        sparse_prompt_embeddings=sparse.to(dtype),
        dense_prompt_embeddings=dense.to(dtype),
        multimask_output=multimask,
        high_resolution_features=embeddings[:-1],
      )
    parts.append((masks, iou))
  masks, iou = (torch.cat(pair, dim=2).numpy() for pair in zip(*parts, strict=True))
  return masks, iou, score[..., 0].numpy()


def language_embeddings() -> np.ndarray:
  """Three objects an image."""
  return 4 * np.random.default_rng(3).normal(size=(2, 3, CONFIG.d_model)).astype(np.float32)


@functools.cache
def torch_language_prompt(model: Sam2Model) -> tuple[torch.Tensor, torch.Tensor]:
  """The reference's prompt by hand: one empty point, padded to two, then the embedding."""
  points, labels = torch.zeros(2, 3, 1, 2), -torch.ones(2, 3, 1, dtype=torch.int32)
  with torch.no_grad():
    empty, dense = model.get_prompt_embeddings(input_points=points, input_labels=labels)
  assert empty.shape == (2, 3, 2, CONFIG.d_model)
  return torch.cat([empty, torch.from_numpy(language_embeddings())[:, :, None]], dim=2), dense


@functools.cache
def torch_language_masks() -> Decoded:
  """What transformers decodes from the language prompts."""
  return torch_decode(torch_model(), *torch_language_prompt(torch_model()))


def decoded_errors(ours: AllMasks, theirs: Decoded) -> dict[str, float]:
  """Differences of mask 0, the multimask masks, IoUs and object scores."""
  masks, iou, scores = theirs
  return {
    "mask 0": unit_error(ours.masks[:, :, 0], masks[:, :, 0]),
    "multimask": unit_error(ours.masks[:, :, 1:], masks[:, :, 1:]),
    "iou": unit_error(ours.iou_pred, iou),
    "object score": unit_error(ours.object_score_logits, scores),
  }


@nnx.jit
def encode(model: Sam2, image: np.ndarray) -> ImageFeatures:
  """Our trunk and neck, compiled."""
  return model.encode_image(image)


@nnx.jit
def decode(
  model: Sam2, features: ImageFeatures, sparse: np.ndarray, dense: np.ndarray | None = None
) -> AllMasks:
  """Our prompts to masks, compiled."""
  return model.decode_prompts(features, sparse, dense)


@nnx.jit
def decode_masks(model: Sam2, features: ImageFeatures, language: np.ndarray) -> MaskOutput:
  """Our language embeddings to one mask each, compiled."""
  return model.decode_masks(features, language)
