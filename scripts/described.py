"""What the pretraining scripts know of an object: where it is and the words of its caption."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Float

from vrt_jax.data.shapes_scene import COLOURS, KINDS, PATTERNS
from vrt_jax.models.layers import Linear
from vrt_jax.models.sam2.prompt_encoder import RandomFourier

WORDS = (*KINDS, *COLOURS, *PATTERNS, "small", "large")
NUM_FEATURES = 2 + len(WORDS)
PROMPTS_FILE = "prompts.npz"
"""Weights of the prompt network, beside the model directory's own files."""
POSITION_WEIGHT = 10.0
"""Of the squared error of positions, against the cross-entropy of a word."""


class PromptNet(nnx.Module):
  """Features [.., NUM_FEATURES] of described objects -> prompts of the mask decoder [.., d_model].

  It stands where text_hidden_fcs stands later, and teaches it. A place starts as SAM 2 encodes a
  point, which the mask decoder can compare with the positions of its image cells from the first
  step; the layers add the words.
  """

  def __init__(self, d_model: int, places: RandomFourier, rngs: nnx.Rngs):
    self.places = places
    self.fc1 = Linear(NUM_FEATURES, 4 * d_model, rngs=rngs)
    self.fc2 = Linear(4 * d_model, d_model, rngs=rngs)

  def __call__(self, features: Float[jax.Array, "*B F"]) -> Float[jax.Array, "*B D"]:
    place = self.places(0.5 * (features[..., :2] + 1.0))
    return place + self.fc2(jax.nn.relu(self.fc1(features)))


def save_prompts(path: Path, net: PromptNet) -> None:
  """Writes a prompt network's weights."""
  layers = nnx.to_pure_dict(nnx.state(net)).items()
  np.savez(path, **{f"{layer}/{name}": w for layer, part in layers for name, w in part.items()})


def load_prompts(path: Path, d_model: int) -> PromptNet:
  """Reads what `save_prompts` wrote."""
  rngs = nnx.Rngs(0)
  net = PromptNet(d_model, RandomFourier(d_model, rngs), rngs)
  with np.load(path) as weights:
    for name, value in weights.items():
      layer, parameter = name.split("/")
      getattr(getattr(net, layer), parameter)[...] = jnp.asarray(value)
  return net


def describe(caption: str, mask: np.ndarray) -> Float[np.ndarray, "F"]:
  """Centre (x, y) of the visible part in [-1, 1] and 0 or 1 for every word of `WORDS`.

  Raises:
    ValueError: the caption has a word that is not in `WORDS`.
  """
  if unknown := sorted(set(caption.split()) - set(WORDS)):
    raise ValueError(f"caption {caption!r} has the unknown word {unknown[0]}")
  rows, columns = np.nonzero(mask)
  features = np.zeros(NUM_FEATURES, np.float32)
  features[0] = 2 * (columns.mean() + 0.5) / mask.shape[1] - 1
  features[1] = 2 * (rows.mean() + 0.5) / mask.shape[0] - 1
  features[[2 + WORDS.index(word) for word in caption.split()]] = 1.0
  return features


def token_features(
  masks: Bool[np.ndarray, "N Y X"], features: Float[np.ndarray, "N F"], rows: int, columns: int
) -> tuple[Float[np.ndarray, "Vt F"], Bool[np.ndarray, "Vt"]]:
  """Features of the object that fills most of each visual token, and whether one fills a tenth."""
  top = np.arange(rows) * masks.shape[1] // rows
  left = np.arange(columns) * masks.shape[2] // columns
  area = np.add.reduceat(np.add.reduceat(masks.astype(np.int32), top, 1), left, 2)
  area = area.reshape(len(masks), -1)  # [N, Vt]
  owner, cell = area.argmax(0), masks[0].size / (rows * columns)
  covered = area.max(0) >= 0.1 * cell
  return np.where(covered[:, None], features[owner], 0.0).astype(np.float32), covered


def feature_loss(
  predicted: Float[jax.Array, "*B F"],
  features: Float[jax.Array, "*B F"],
  has_place: Bool[jax.Array, "*B"],
  valid: Bool[jax.Array, "*B"],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of the words plus squared error of the place, means over valid rows.

  Also gives the share of words told and the error of the place in units of the picture's side.
  """
  count, placed = jnp.maximum(jnp.sum(valid), 1), has_place & valid
  words = optax.sigmoid_binary_cross_entropy(predicted[..., 2:], features[..., 2:]).sum(-1)
  squared = jnp.square(predicted[..., :2] - features[..., :2]).sum(-1)
  places = jnp.maximum(jnp.sum(placed), 1)
  square = jnp.sum(squared * placed) / places
  loss = jnp.sum(words * valid) / count + POSITION_WEIGHT * square
  told = jnp.sum((predicted[..., 2:] > 0) * features[..., 2:] * placed[..., None])
  said = jnp.sum(features[..., 2:] * placed[..., None])
  return loss, {"told": told / jnp.maximum(said, 1), "place": jnp.sqrt(square / 2) / 2}
