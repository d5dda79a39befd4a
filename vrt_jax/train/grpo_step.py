"""One update of GRPO: the policy's objective on completions, mask losses on the best samples."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from vrt_jax.config import GrpoConfig, OptimConfig, Remat, SftLossConfig
from vrt_jax.losses.grpo import clipped_tokens, grpo_loss, kl_divergence
from vrt_jax.losses.mask import mask_losses, merged_masks
from vrt_jax.models.lora import without_lora
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.rl.policy import (
  CompletionStates,
  GrpoBatch,
  best_sample,
  completion_logps,
  completion_states,
  policy_logps,
  policy_temperature,
  seg_states,
)
from vrt_jax.train.state import Frozen, TrainState
from vrt_jax.train.update import Metrics, Step, accumulate, make_step, remat_of

GAP = "rollout/logprob_gap"


@dataclass(frozen=True)
class Totals:
  """Counts of the whole batch by which the sums of its parts are divided."""

  samples: Array
  tokens: Array
  masks: Array


def masks_that_count(batch: GrpoBatch, grpo: GrpoConfig) -> Bool[Array, "B"]:
  """Where the group's best sample has mask losses."""
  has_mask = best_sample(batch.completions.seg_slots, batch.best) >= 0
  counted = has_mask if grpo.mask_loss == "reference" else has_mask & batch.best_is_answer
  return batch.best_valid & jnp.any(counted, axis=1)


def policy_terms(
  model: Sa2VA,
  logps: Float[Array, "B G N"],
  batch: GrpoBatch,
  totals: Totals,
  grpo: GrpoConfig,
) -> Metrics:
  """The policy's loss and what belongs to it, divided by the whole batch's samples or tokens."""
  rows, n = batch.advantages.size, logps.shape[-1]
  flat, old = logps.reshape(rows, n), batch.completions.logps.reshape(rows, n)
  mask = batch.completions.token_mask.reshape(rows, n)
  advantages = (batch.advantages[..., None] + batch.credit).reshape(rows, n)
  old_logps = old if grpo.updates_per_rollout > 1 else None
  loss, _ = grpo_loss(
    flat,
    mask,
    advantages,
    old_logps=old_logps,
    epsilon=grpo.epsilon,
    normalisation=grpo.normalisation,
  )
  clipped = clipped_tokens(flat, mask, advantages, old_logps=old_logps, epsilon=grpo.epsilon)
  kl = jnp.zeros(())
  if grpo.kl_weight:
    reference = policy_logps(without_lora(model), batch, policy_temperature(grpo))
    kl = kl_divergence(flat, reference.reshape(rows, n), mask, grpo.normalisation)
  return {
    "loss/policy": loss / totals.samples,
    "kl": kl / totals.samples,
    "clip_share": clipped / jnp.maximum(totals.tokens, 1.0),
    GAP: jnp.max(jnp.abs(flat - old)),
  }


def mask_terms(
  model: Sa2VA,
  states: CompletionStates,
  batch: GrpoBatch,
  key: Array,
  totals: Totals,
  grpo: GrpoConfig,
  losses: SftLossConfig,
) -> Metrics:
  """BCE and dice of each group's best sample, whose masks are merged into one."""
  assert grpo.mask_loss != "off"
  slots = best_sample(batch.completions.seg_slots, batch.best)
  own = best_sample(states.own, batch.best)
  hidden = seg_states(own[:, None], slots[:, None])[:, 0]  # [B, M, D]
  masks = model.decode_masks(batch.image, hidden).low_res_masks
  merged, _ = merged_masks(masks, slots >= 0, batch.best_is_answer, grpo.mask_loss)
  valid = masks_that_count(batch, grpo)
  bce, dice, _ = mask_losses(
    key, merged[:, None], batch.answer_mask[:, None], valid[:, None], losses
  )
  return {
    "loss/mask_bce": bce / (totals.masks + 1e-4 / losses.num_points),
    "loss/mask_dice": dice / (totals.masks + 1e-4),
  }


def update_loss(
  trainable: nnx.State,
  frozen: Frozen,
  batch: GrpoBatch,
  key: Array,
  totals: Totals,
  grpo: GrpoConfig,
  losses: SftLossConfig,
  remat: Remat,
) -> tuple[Array, Metrics]:
  """Loss of a (part of a) batch, normalised by the whole batch's `totals`.

  loss = policy + kl_weight KL + 2.0 BCE + 0.5 dice (mask weights from `losses`).
  """
  model = frozen.merge(trainable)
  states = completion_states(
    model, batch.prompts, batch.rope_deltas, batch.visual, batch.completions.tokens, remat=remat
  )
  logps = completion_logps(model, states, batch.completions, policy_temperature(grpo))
  metrics = policy_terms(model, logps, batch, totals, grpo)
  metrics |= {"loss/mask_bce": jnp.zeros(()), "loss/mask_dice": jnp.zeros(())}
  if grpo.mask_loss != "off":
    metrics |= mask_terms(model, states, batch, key, totals, grpo, losses)
  loss = (
    metrics["loss/policy"]
    + grpo.kl_weight * metrics["kl"]
    + losses.bce_weight * metrics["loss/mask_bce"]
    + losses.dice_weight * metrics["loss/mask_dice"]
  )
  return loss, {"loss": loss, **metrics}


def grpo_gradients(
  state: TrainState,
  frozen: Frozen,
  batch: GrpoBatch,
  key: Array,
  optim: OptimConfig,
  grpo: GrpoConfig,
  losses: SftLossConfig,
) -> tuple[nnx.State, Metrics]:
  """Gradients and metrics of a batch, computed in optim.accumulation_steps equal parts."""
  totals = Totals(
    samples=jnp.asarray(batch.advantages.size, jnp.float32),
    tokens=jnp.sum(batch.completions.lengths).astype(jnp.float32),
    masks=jnp.sum(masks_that_count(batch, grpo)).astype(jnp.float32),
  )

  packed = batch.prompts.input_ids.shape[1] + batch.completions.tokens[0].size
  remat = remat_of(optim, packed)

  def part(part_batch: GrpoBatch, part_key: Array) -> tuple[nnx.State, Metrics]:
    return jax.grad(update_loss, has_aux=True)(
      state.trainable, frozen, part_batch, part_key, totals, grpo, losses, remat
    )

  grads, metrics = accumulate(part, state.trainable, batch, key, optim.accumulation_steps)
  return grads, {n: jnp.max(x) if n == GAP else jnp.sum(x) for n, x in metrics.items()}


def make_grpo_step(
  optimizer: optax.GradientTransformation,
  optim: OptimConfig,
  grpo: GrpoConfig,
  losses: SftLossConfig,
  like: TrainState,
) -> Step[GrpoBatch]:
  """The jitted update: (state, frozen, batch, key) -> (state, metrics), see `update.make_step`.

  Several updates of a rollout are several calls. LoRA dropout is off, as in the rollout, so that at
  first both compute the same probabilities; `rollout/logprob_gap` is the largest difference over
  all tokens.

  Raises:
    ValueError: optim.trainable is "all"; features of pictures come from the rollout, so the vision
      tower and SAM 2's encoder would have no gradients.
  """
  if optim.trainable == "all":
    raise ValueError('optim.trainable is "all", which GRPO cannot train: "language" or "adapters"')

  def gradients(
    state: TrainState, frozen: Frozen, batch: GrpoBatch, key: Array
  ) -> tuple[nnx.State, Metrics]:
    return grpo_gradients(state, frozen, batch, key, optim, grpo, losses)

  return make_step(optimizer, gradients, like)
