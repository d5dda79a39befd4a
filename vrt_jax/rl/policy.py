"""What the policy of now makes of completions: log-probabilities and [SEG] states.

A prompt and its G completions go through the text decoder as one packed sequence, [P prompt slots,
G runs of N]: the prompt is computed once a group, with gradients, and every completion sees it and
itself. Token i of a completion has the position and the neighbours that it had in the rollout.
LoRA dropout is off, as there. Largest (mean) gap to the rollout's log-probabilities, measured on a
CPU with a random model of 8 layers and width 512, a prompt of 200 tokens and 4 x 32 new tokens:
4e-6 (8e-7) in float32, 0.011 (9e-4) in bfloat16.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, UInt8

from vrt_jax.config import GrpoConfig, Remat
from vrt_jax.generate.decode import last_states
from vrt_jax.losses.token import token_logps
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.models.sam2.model import ImageFeatures
from vrt_jax.ops.group_attention import PackedMask
from vrt_jax.types import Completions, TextInputs, VisualFeatures


class GrpoBatch(flax.struct.PyTreeNode):
  """What an update needs: prompts, their rollout, and what the rewards made of it.

  Every array has the prompts first but for `prompts.position_ids` [3, B, P].
  """

  prompts: TextInputs
  rope_deltas: Int32[Array, "B"]
  """Position of the first new token minus the prompt's length."""
  visual: VisualFeatures
  image: ImageFeatures
  completions: Completions
  advantages: Float[Array, "B G"]
  credit: Float[Array, "B G N"]
  """What is added to the advantage of single tokens, see `vrt_jax.rl.credit`."""
  best: Int32[Array, "B"]
  """The group's best sample, which has mask losses."""
  best_valid: Bool[Array, "B"]
  """False where it has none: no [SEG], or no ground truth."""
  best_is_answer: Bool[Array, "B M"]
  """Which of its masks are the answer's."""
  answer_mask: UInt8[Array, "B Y X"]
  """Union of the answer's true masks at the low-resolution size, 0 or 1."""


class CompletionStates(flax.struct.PyTreeNode):
  """The text decoder's output in the completions, before the final norm."""

  before: Float[Array, "B G N D"]
  """The state that predicts each token: of the token before it."""
  own: Float[Array, "B G N D"]
  """The state of each token."""


def completion_states(
  model: Sa2VA,
  prompts: TextInputs,
  rope_deltas: Int32[Array, "B"],
  visual: VisualFeatures,
  tokens: Int32[Array, "B G N"],
  *,
  remat: Remat = "none",
) -> CompletionStates:
  """One pass over prompts and completions; what follows a completion's end means nothing."""
  language = model.qwen.language_model
  b, g, n = tokens.shape
  p = prompts.input_ids.shape[1]
  embeds = model.qwen.embed_with(prompts, visual.tokens, model.dtype)
  new = language.embed(tokens.reshape(b, g * n)).astype(model.dtype)
  first = jnp.sum(prompts.token_mask, axis=1) + rope_deltas
  positions = jnp.tile(first[:, None] + jnp.arange(n), (1, g))  # [B, G * N]
  positions = jnp.broadcast_to(positions, (3, b, g * n))
  hidden, _ = language.hidden_states(
    jnp.concatenate([embeds, new], axis=1),
    jnp.concatenate([prompts.position_ids, positions], axis=2),
    PackedMask(prompts.token_mask, g),
    jnp.moveaxis(visual.deepstack, 1, 0),
    jnp.pad(prompts.visual_index, ((0, 0), (0, g * n)), constant_values=-1),
    remat=remat,
  )
  own = hidden[:, p:].reshape(b, g, n, -1)
  last = last_states(hidden[:, :p], prompts.token_mask)
  last = jnp.broadcast_to(last[:, None, None], (b, g, 1, last.shape[-1]))
  return CompletionStates(before=jnp.concatenate([last, own[:, :, :-1]], axis=2), own=own)


def policy_temperature(grpo: GrpoConfig) -> float:
  """Of the log-probabilities that are trained."""
  return grpo.temperature if grpo.tempered else 1.0


def completion_logps(
  model: Sa2VA, states: CompletionStates, completions: Completions, temperature: float = 1.0
) -> Float[Array, "B G N"]:
  """float32 log-probability of each token at `temperature` > 0; 0 after the end."""
  language = model.qwen.language_model
  b, g, n, d = states.before.shape
  hidden = language.final_norm(states.before).reshape(b, g * n, d) / temperature
  tokens, counted = (x.reshape(b, g * n) for x in (completions.tokens, completions.token_mask))
  return token_logps(hidden, language.head_weight(), tokens, counted).reshape(b, g, n)


def seg_states(
  own: Float[Array, "B G N D"], seg_slots: Int32[Array, "B G M"]
) -> Float[Array, "B G M D"]:
  """The states at the [SEG]s; those of unused slots mean nothing."""
  return jnp.take_along_axis(own, jnp.maximum(seg_slots, 0)[..., None], axis=2)


def policy_logps(
  model: Sa2VA, batch: GrpoBatch, temperature: float = 1.0, *, remat: Remat = "none"
) -> Float[Array, "B G N"]:
  """Log-probabilities of a batch's completions under `model` at `temperature`."""
  states = completion_states(
    model, batch.prompts, batch.rope_deltas, batch.visual, batch.completions.tokens, remat=remat
  )
  return completion_logps(model, states, batch.completions, temperature)


def best_sample(x: Array, best: Int32[Array, "B"]) -> Array:
  """[B, G, ..] -> [B, ..]: of each group the sample with index `best`."""
  return jax.vmap(lambda rows, index: rows[index])(x, best)
