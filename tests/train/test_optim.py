"""The learning-rate schedule, the optimiser against torch, and what trains."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from tests import tiny
from vrt_jax.config import LoraConfig, OptimConfig, TextConfig
from vrt_jax.models.qwen3_vl.text import TextDecoder
from vrt_jax.train.optim import learning_rate_schedule, make_optimizer, muon, trainable_filter


def test_schedule_warms_up_and_falls_to_zero():
  schedule = learning_rate_schedule(OptimConfig(learning_rate=4e-5, steps=100, warmup_share=0.05))
  assert float(schedule(0)) == pytest.approx(4e-5 * 1e-5)
  assert float(schedule(5)) == pytest.approx(4e-5)
  assert float(schedule(2)) == pytest.approx(4e-5 * (1e-5 + (1 - 1e-5) * 2 / 5), rel=1e-5)
  middle = 5 + 95 / 2
  assert float(schedule(middle)) == pytest.approx(2e-5, rel=1e-4)
  assert float(schedule(100)) == pytest.approx(0, abs=1e-12)
  rates = [float(schedule(i)) for i in range(5, 101)]
  assert all(a > b for a, b in itertools.pairwise(rates))


def test_schedule_without_warm_up_starts_in_full():
  schedule = learning_rate_schedule(OptimConfig(learning_rate=1e-5, steps=60, warmup_share=0.0))
  assert float(schedule(0)) == pytest.approx(1e-5)
  assert float(schedule(30)) == pytest.approx(5e-6)
  assert float(schedule(60)) == pytest.approx(0, abs=1e-12)


def test_updates_equal_torch_adamw_with_clipping():
  config = OptimConfig(learning_rate=1e-2, steps=20, warmup_share=0.1)
  rng = np.random.default_rng(0)
  start = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(5,))}
  params = {k: jnp.asarray(v, jnp.float32) for k, v in start.items()}
  leaves = {k: torch.tensor(v, dtype=torch.float32, requires_grad=True) for k, v in start.items()}
  optimizer = make_optimizer(config)
  reference = torch.optim.AdamW(leaves.values(), lr=1, betas=config.betas, weight_decay=0.05)
  schedule = learning_rate_schedule(config)
  state = optimizer.init(params)
  for step in range(10):
    grads = {k: 3 * rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
    updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
    params = optax.apply_updates(params, updates)
    for k, leaf in leaves.items():
      leaf.grad = torch.tensor(grads[k])
    torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
    reference.param_groups[0]["lr"] = float(schedule(step))
    reference.step()
  for k, leaf in leaves.items():
    np.testing.assert_allclose(params[k], leaf.detach().numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(params[k] - start[k]).max() > 1e-2


def test_muon_turns_matrices_and_adam_the_rest():
  decoder = TextDecoder(TextConfig(vocab_size=32, num_layers=2), LoraConfig(), nnx.Rngs(0))
  params = nnx.state(decoder)
  optimizer = muon(lambda step: 0.1, optax.adamw(0.1, weight_decay=0.0))
  grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  grads, updates = (
    {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(s)}
    for s in (grads, updates)
  )
  name = "layers.self_attn.q_proj.weight"
  for grad, update in zip(grads[name], updates[name], strict=True):
    left, values, right = np.linalg.svd(grad)
    large = values > 0.1 * values[0]
    turned = -np.diag(left.T @ update @ right.T)[large]  # same directions, nearly equal strengths
    assert turned.min() > 0.4 * turned.max() > 0
    assert values[large].min() < 0.2 * values[0]
  for name in ("embed_tokens.weight", "layers.input_layernorm.weight", "norm.weight"):
    np.testing.assert_allclose(np.abs(updates[name]), 0.1, rtol=0.01)  # the first step of Adam


def paths(trainable: str) -> tuple[set[str], set[str]]:
  """Names of the trained and of the frozen parameters."""
  model = tiny.random_model(tiny.train_config().model)
  _, trained, fixed = nnx.split(model, trainable_filter(trainable), ...)
  return tuple({".".join(map(str, p)) for p, _ in nnx.to_flat_state(s)} for s in (trained, fixed))


def test_all_trains_everything_but_the_random_fourier_matrix():
  trained, fixed = paths("all")
  assert fixed == {"sam2.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"}
  assert any(name.endswith("lora_a") for name in trained)


def test_adapters_leave_the_base_alone():
  trained, fixed = paths("adapters")
  assert sum(name.endswith("lora_a") for name in trained) == 7
  assert "sam2.mask_decoder.conv_s0.weight" in trained  # they belong to the decoder
  assert "text_hidden_fcs.fc1.weight" in trained
  assert "qwen.language_model.embed_tokens.weight" in fixed
  assert "qwen.language_model.layers.self_attn.q_proj.weight" in fixed
  assert any(name.startswith("sam2.prompt_encoder") for name in fixed)
  assert any(name.startswith("qwen.visual") for name in fixed)
  assert not any(name.startswith(("qwen.visual", "sam2.image_encoder")) for name in trained)


def test_language_leaves_the_mask_decoder_out():
  trained, fixed = paths("language")
  assert paths("adapters")[0] - trained == {n for n in fixed if n.startswith("sam2.mask_decoder")}
  assert "text_hidden_fcs.fc1.weight" in trained
  assert sum(name.endswith("lora_b") for name in trained) == 7


def test_unknown_choice_names_the_allowed_ones():
  with pytest.raises(ValueError, match='"lora", not "language", "adapters" or "all"'):
    trainable_filter("lora")
