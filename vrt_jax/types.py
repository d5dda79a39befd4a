"""Dimension letters and the arrays that travel between data, models, losses and training.

Dimension letters, used in every shape of this project:

    B batch        T tokens        P image patches   V vocabulary
    D model width  F mlp width     N query heads     K key/value heads
    H head width   L layers        G group           M masks (one a [SEG])
    Y rows         X columns (pixels or mask cells)  C patch values

A *visual token* is one merged 2x2 block of patches, so a sample has P / 4 of them.
"""

from typing import cast

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32, UInt8

IGNORE_INDEX = -100
"""Label of a position that carries no language-model loss."""


def on_host(array: np.ndarray) -> Array:
  """A numpy array in a field of the batches below, which `placement.put_batch` brings to devices.

  Itself; for type checkers it is what JAX will make of it.
  """
  return cast(Array, array)


class VisionInputs(flax.struct.PyTreeNode):
  """The images of a batch, packed sample by sample to P patches (padding has segment 0)."""

  pixel_values: UInt8[Array, "B P C"]
  """Raw patch values; C = 3 * temporal_patch_size * patch_size**2, normalised on the device."""
  patch_segments: Int32[Array, "B P"]
  """1, 2, .. for the images of a sample, 0 for padding; attention stays within a segment."""
  patch_positions: Int32[Array, "B P 2"]
  """Row and column of a patch in its image, for the 2-D rotary embedding."""
  pos_embed_index: Int32[Array, "B P 4"]
  """The four learned positions that a patch interpolates between."""
  pos_embed_weight: Float[Array, "B P 4"]
  """Their bilinear weights (zeros for padding)."""


class TextInputs(flax.struct.PyTreeNode):
  """Token ids of a batch, right-padded."""

  input_ids: Int32[Array, "B T"]
  token_mask: Bool[Array, "B T"]
  """True where there is a token, False for padding."""
  position_ids: Int32[Array, "3 B T"]
  """M-RoPE positions: time, row, column."""
  visual_index: Int32[Array, "B T"]
  """Index of the visual token that stands at a position, -1 for text."""


class Targets(flax.struct.PyTreeNode):
  """What the SFT losses compare with."""

  labels: Int32[Array, "B T"]
  """input_ids where a token is to be predicted, IGNORE_INDEX elsewhere (not shifted)."""
  seg_positions: Int32[Array, "B M"]
  """Positions of the sampled [SEG] input tokens."""
  seg_valid: Bool[Array, "B M"]
  """False for filler rows (a sample without masks)."""
  masks: UInt8[Array, "B M Y X"]
  """Ground truth at the low-resolution mask size, 0 or 1."""


class Batch(flax.struct.PyTreeNode):
  """One training batch."""

  vision: VisionInputs
  text: TextInputs
  grounding_image: UInt8[Array, "B Y X 3"]
  """RGB at SAM 2's input size, normalised on the device."""
  targets: Targets


class PromptTruth(flax.struct.PyTreeNode):
  """What is known of one prompt besides its inputs; stays on the host."""

  key: str
  question: str
  image_size: tuple[int, int]
  """(height, width) of the picture in pixels."""
  answer_masks: UInt8[np.ndarray, "N Y X"]
  """Of the answer objects at the low-resolution size, 0 or 1."""
  evidence_masks: UInt8[np.ndarray, "E Y X"]
  """Of the objects that the reference trace's reasoning mentions, each once."""


class PromptBatch(flax.struct.PyTreeNode):
  """Prompts of reinforcement learning, with their ground truth."""

  text: TextInputs
  vision: VisionInputs
  rope_deltas: Int32[Array, "B"]
  """Position of the first new token minus the prompt's length."""
  grounding_image: UInt8[Array, "B Y X 3"]
  truths: tuple[PromptTruth, ...]
  """One a row."""


class VisualFeatures(flax.struct.PyTreeNode):
  """What the vision tower makes of the images of a batch."""

  tokens: Float[Array, "B Vt D"]
  """Visual tokens, Vt = P / 4, as they stand among the token embeddings."""
  deepstack: Float[Array, "B n Vt D"]
  """Features that are added after the first n text layers."""


class Completions(flax.struct.PyTreeNode):
  """G samples of each of B prompts."""

  tokens: Int32[Array, "B G N"]
  """Generated ids; the pad id after the end token."""
  lengths: Int32[Array, "B G"]
  """The end token included."""
  logps: Float[Array, "B G N"]
  """float32 log-probability of each token over the whole vocabulary at the policy's temperature; 0
  after the end."""
  seg_slots: Int32[Array, "B G M"]
  """Index in `tokens` of the [SEG]s that were inputs, so have a hidden state; -1 where none."""

  @property
  def token_mask(self) -> Bool[Array, "B G N"]:
    """True up to the end token."""
    return jnp.arange(self.tokens.shape[-1]) < self.lengths[..., None]
