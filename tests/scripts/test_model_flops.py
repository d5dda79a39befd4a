"""FLOPs by formula against those of the traced models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from scripts.model_flops import (
  attention_flops,
  decode_flops,
  group_pairs,
  grpo_flops,
  prefill_flops,
  rollout_flops,
  sft_flops,
  text_flops,
  traced_flops,
  vision_flops,
)
from tests import tiny
from tests.rl import group_case as case
from vrt_jax.config import LoraConfig
from vrt_jax.models.layers import ShapeRngs
from vrt_jax.models.qwen3_vl.text import TextDecoder
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.rl.policy import completion_states
from vrt_jax.sizes import sa2va_sizes

TOKENS = 24


def test_text():
  """The traced attention computes masked scores too: twice the pairs, but for the diagonal."""
  config, lora = tiny.MODEL.text, LoraConfig(rank=4)
  model = nnx.eval_shape(lambda: TextDecoder(config, lora, ShapeRngs()))
  graphdef, state = nnx.split(model)
  ones = jnp.ones((1, TOKENS), jnp.int32)

  def forward(state, embeds):
    model = nnx.merge(graphdef, state)
    mask = AttentionMask.causal(ones, ones)
    positions = jnp.zeros((3, 1, TOKENS), jnp.int32)
    return model.logits(model.hidden_states(embeds, positions, mask)[0])

  embeds = jax.ShapeDtypeStruct((1, TOKENS, config.hidden_size), jnp.float32)
  found = text_flops(config, 4, TOKENS, TOKENS)
  whole_attention = found.attention * 2 * TOKENS / (TOKENS + 1)
  wanted = found.linears + found.lora + whole_attention + found.head
  assert traced_flops(forward, state, embeds) == wanted


def test_vision():
  batch = tiny.batch()
  vision = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch.vision)
  graphdef, state = nnx.split(tiny.random_model(tiny.MODEL).qwen.visual)
  patches = vision.pixel_values.shape[1]
  traced = traced_flops(lambda s, v: nnx.merge(graphdef, s)(v, jnp.float32), state, vision)
  assert vision_flops(tiny.MODEL.vision, patches) == pytest.approx(traced, rel=1e-6)


def test_parts_of_a_step():
  """What trains costs three passes, what passes gradients on two, the rest one."""
  model = dataclasses.replace(tiny.MODEL, lora=LoraConfig(rank=4))
  adapters = sft_flops(model, TOKENS, 64, 2, train_all=False).parts
  everything = sft_flops(model, TOKENS, 64, 2, train_all=True).parts
  forward = prefill_flops(model, TOKENS, 64).parts
  assert adapters["text linears"] == 2 * forward["text linears"]
  assert everything["vision tower"] == 3 * adapters["vision tower"]
  assert adapters["text LoRA"] == 3 * text_flops(model.text, 4, TOKENS, 0).lora
  assert "text LoRA" not in forward


def test_4b_is_about_two_flops_a_parameter_and_token():
  text = sa2va_sizes("4B").text
  flops = text_flops(text, 0, 1, 0).linears
  assert flops == 2 * 3_633_315_840


def test_a_sample_is_its_prefill_and_its_tokens():
  model = dataclasses.replace(tiny.MODEL, lora=LoraConfig(rank=0))
  grpo = dataclasses.replace(case.GRPO, group_size=1, max_new_tokens=7)
  whole = rollout_flops(model, grpo, TOKENS, 64).parts
  prompt, tokens = prefill_flops(model, TOKENS, 64).parts, decode_flops(model, TOKENS, 7).parts
  for name in ("text linears", "text attention", "output embedding"):
    assert prompt[name] + tokens[name] == whole[name] and tokens[name] > 0


def test_a_group_in_one_sequence():
  """Traced: the prompt computes all P x P scores, a completion those of P + N keys."""
  model, grpo = case.MODEL, case.GRPO
  g, n, p = grpo.group_size, grpo.max_new_tokens, case.PROMPT_SLOTS
  batch = jax.tree.map(lambda x: x[:1], case.random_batch(2))
  positions = case.random_batch(2).prompts.position_ids[:, :1]
  batch = batch.replace(prompts=batch.prompts.replace(position_ids=positions))
  graphdef, state = nnx.split(tiny.random_model(model))

  def forward(state, batch):
    merged = nnx.merge(graphdef, state)
    tokens = batch.completions.tokens
    states = completion_states(merged, batch.prompts, batch.rope_deltas, batch.visual, tokens)
    return merged.qwen.language_model.logits(states.before)

  found = text_flops(model.text, model.lora.rank, p + g * n, g * n)
  scores = attention_flops(model.text, p * p + g * n * (p + n))
  assert traced_flops(forward, state, batch) == found.linears + found.lora + scores + found.head
  looked_at = p * (p + 1) / 2 + g * sum(p + i + 1 for i in range(n))
  assert group_pairs(p, g, n) == looked_at < p * p + g * n * (p + n)


def test_parts_of_reinforcement_learning():
  """The update's prompt and completions cost what the rollout's do, but for the last tokens."""
  grpo = dataclasses.replace(case.GRPO, max_new_tokens=400)
  rollout = rollout_flops(case.MODEL, grpo, TOKENS, 64).parts
  update = grpo_flops(case.MODEL, grpo, TOKENS, train_decoder=False).parts
  assert update["text linears"] == pytest.approx(2 * rollout["text linears"], rel=0.01)
  assert update["text attention"] == pytest.approx(3 * rollout["text attention"], rel=0.02)
  assert update["mask decoder"] < rollout["mask decoder"]
  assert "vision tower" not in update
  with_kl = grpo_flops(
    case.MODEL, dataclasses.replace(grpo, kl_weight=0.1), TOKENS, train_decoder=False
  ).parts
  assert with_kl["text linears"] == 1.5 * update["text linears"]
  assert with_kl["text LoRA"] == update["text LoRA"]
