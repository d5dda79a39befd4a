"""Group rollout: G samples of each prompt, their masks and their log-probabilities, in one program.

Prompts run once and their keys and values are shared by the group; SAM 2 encodes a picture once,
and the masks of all samples are decoded from it together. What is frozen, the features of pictures,
is handed on to the update.
"""

from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh
from jaxtyping import Float, Int32, Key

from vrt_jax.config import GrpoConfig
from vrt_jax.generate.decode import (
  GenerationInputs,
  TokenIds,
  TokenStats,
  decode,
  last_states,
  read_prompts,
  row_keys,
  start_groups,
  token_lengths,
)
from vrt_jax.generate.sampling import Sampling
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.models.sam2.model import ImageFeatures
from vrt_jax.ops.sharding import constrain_batch, on_mesh
from vrt_jax.rl.policy import policy_temperature
from vrt_jax.types import Completions, VisualFeatures


class Rollout(flax.struct.PyTreeNode):
  """What G samples of each prompt said and segmented; every array has the prompts first."""

  completions: Completions
  entropy: Float[Array, "B G"]
  """Token mean of the policy's entropy, in nats."""
  low_res_masks: Float[Array, "B G M Y X"]
  """Logits of the masks of `completions.seg_slots`, float32; those of unused slots mean nothing."""
  visual: VisualFeatures
  """Of the vision tower, and SAM 2's features below: the update uses them again."""
  image: ImageFeatures


class Splits(Protocol):
  """Frozen parameters that join trainable ones to a model (`vrt_jax.train.state.Frozen`)."""

  def merge(self, trainable: nnx.State) -> Sa2VA:
    """The whole model."""
    ...


RolloutFunction = Callable[[nnx.State, Splits, GenerationInputs, Key[Array, ""]], Rollout]


def make_rollout(
  grpo: GrpoConfig, ids: TokenIds, mesh: AbstractMesh | None = None
) -> RolloutFunction:
  """The jitted rollout: (trainable, frozen, prompts, key) -> Rollout.

  Sample g of row b is drawn from (key, b, g) alone, so it is the same on any `mesh`, over which
  parameters and prompts are divided. LoRA dropout is off, as in the update, so that both compute
  the same function. Log-probabilities are those of the whole vocabulary at
  `policy_temperature`; the other settings of sampling do not act on them.
  """

  @jax.jit
  def rollout(
    trainable: nnx.State, frozen: Splits, prompts: GenerationInputs, key: Key[Array, ""]
  ) -> Rollout:
    with on_mesh(mesh):
      return jax.tree.map(
        constrain_batch, _rollout(frozen.merge(trainable), prompts, key, grpo, ids)
      )

  return rollout


def _rollout(
  model: Sa2VA, prompts: GenerationInputs, key: Array, grpo: GrpoConfig, ids: TokenIds
) -> Rollout:
  text = prompts.text
  visual = model.qwen.visual_features(prompts.vision, model.dtype)
  cache, hidden = read_prompts(model, text, visual)
  b, g, n, m = hidden.shape[0], grpo.group_size, grpo.max_new_tokens, grpo.max_masks
  keys = row_keys(key, b, g)
  state = start_groups(cache, prompts, keys, hidden.shape[-1], n, m, ids.pad)
  stats = TokenStats(jnp.zeros((b, g, n)), jnp.zeros((b, g)), policy_temperature(grpo))
  state = state.replace(stats=stats)
  logits = model.qwen.language_model.logits(last_states(hidden, text.token_mask))
  state = decode(model, state, logits, Sampling(grpo.temperature, grpo.top_p), ids)

  assert state.stats is not None
  image = model.sam2.encode_image(prompts.grounding_image, model.dtype)
  lengths = token_lengths(state.tokens, ids.end)
  completions = Completions(
    tokens=state.tokens,
    lengths=lengths,
    logps=state.stats.logps,
    seg_slots=seg_slots(state.tokens, ids.seg, m),
  )
  return Rollout(
    completions=completions,
    entropy=state.stats.entropy / lengths,
    low_res_masks=decode_group_masks(model, image, state.seg_hidden),
    visual=visual,
    image=image,
  )


def seg_slots(tokens: Int32[Array, "B G N"], seg: int, max_masks: int) -> Int32[Array, "B G M"]:
  """Indices of the first M [SEG]s among all but the last token, -1 where there are fewer."""
  n = tokens.shape[-1]
  slots = jnp.where(tokens[..., :-1] == seg, jnp.arange(n - 1), n)
  slots = jnp.pad(slots, ((0, 0), (0, 0), (0, max(0, max_masks + 1 - n))), constant_values=n)
  first = jnp.sort(slots, axis=-1)[..., :max_masks]
  return jnp.where(first < n, first, -1).astype(jnp.int32)


def decode_group_masks(
  model: Sa2VA, image: ImageFeatures, seg_hidden: Float[Array, "B G M D"]
) -> Float[Array, "B G M Y X"]:
  """Low-resolution logits of the masks of all samples, float32: one batch an image."""
  b, g, m, d = seg_hidden.shape
  masks = model.decode_masks(image, seg_hidden.reshape(b, g * m, d)).low_res_masks
  return masks.reshape(b, g, m, *masks.shape[2:])
