"""Attention through cuDNN: which masks go there, and on a GPU its values and gradients.

Without a GPU, JAX's own `dot_product_attention` stands for the kernel: the same arguments, the same
function.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.ops import attention as module
from vrt_jax.ops import flash, group_attention, sharding
from vrt_jax.ops.attention import attention
from vrt_jax.ops.attention_mask import AttentionMask
from vrt_jax.ops.group_attention import PackedMask, packed_attention

B, T, H = 2, 1280, 64
LENGTHS = jnp.asarray([[T], [1100]])
TOKENS = (jnp.arange(T) < LENGTHS).astype(jnp.int32)
PICTURES = jnp.where(jnp.arange(T) < 400, 1, 2 * TOKENS)
"""Two in a row, the second one of 880 and of 700 patches."""
MASKS = {
  "none": None,
  "causal": AttentionMask.causal(TOKENS, TOKENS),
  "one picture": AttentionMask(TOKENS, TOKENS),
  "two pictures": AttentionMask(PICTURES, PICTURES),
  "a hole": AttentionMask(TOKENS, TOKENS.at[:, 0].set(0)),
}
PROMPT, GROUP = 512, 3
PACKED = PackedMask(jnp.arange(PROMPT) < jnp.asarray([[PROMPT], [401]]), GROUP)
PACKED_ROWS = jnp.pad(PACKED.prompt_mask, ((0, 0), (0, T - PROMPT)), constant_values=True)
ON_A_GPU = jax.default_backend() == "gpu"
NEEDS_A_GPU = pytest.mark.skipif(not ON_A_GPU, reason="needs a GPU and JAX_PLATFORMS=cuda")


def arrays(dtype: jnp.dtype = jnp.bfloat16) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (4, 2, 2)]


def value_and_grads(run, rows: jax.Array) -> list[np.ndarray]:
  """Of `run(q, k, v)`; rows of padding do not count."""

  def loss(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = run(*x).astype(jnp.float32) * rows[:, :, None, None]
    return jnp.sum(jnp.sin(out)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays())
  return [np.asarray(x, np.float32) for x in (out, *grads)]


def masked(name: str) -> list[np.ndarray]:
  mask = MASKS[name]
  rows = jnp.ones((B, T)) if mask is None else (mask.q_segments > 0).astype(jnp.float32)
  return value_and_grads(lambda *x: attention(*x, mask), rows)


def packed() -> list[np.ndarray]:
  return value_and_grads(lambda *x: packed_attention(*x, PACKED), PACKED_ROWS.astype(jnp.float32))


def close(found: list[np.ndarray], wanted: list[np.ndarray], atol: float = 0.03) -> None:
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0.02, atol=atol)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
  """Programs are as for a GPU; the calls of the kernel that were traced."""
  calls, ours = [], jax.nn.dot_product_attention

  def stands_for_cudnn(q, k, v, *, implementation: str, **kind: object) -> jax.Array:
    calls.append({"implementation": implementation, "queries": q.shape[:2], **kind})
    return ours(q, k, v, **kind)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stands_for_cudnn)
  monkeypatch.setattr(flash, "compute_capability", lambda: 9.0)
  for part in (sharding, module, flash):
    monkeypatch.setattr(part, "platform", lambda: "gpu")
  return calls


@pytest.mark.parametrize(("name", "is_causal"), [("causal", True), ("none", False)])
def test_gpus_use_the_kernel_for_masks_that_it_knows(kernel, monkeypatch, name, is_causal):
  found = masked(name)
  assert kernel == [{"implementation": "cudnn", "queries": (B, T), "is_causal": is_causal}]
  monkeypatch.setattr(module, "flash_knows", lambda _: False)
  close(found, masked(name))
  assert len(kernel) == 1


@pytest.mark.parametrize("name", ["one picture", "two pictures", "a hole"])
def test_segments_go_there_where_they_are_the_first_keys(kernel, monkeypatch, name):
  """The program holds both ways; a kernel that fills its output with 7 tells which one ran."""
  found = masked(name)
  assert kernel and all("key_value_seq_lengths" in call for call in kernel)
  monkeypatch.setattr(flash, "_cudnn", lambda q, *_, **__: jnp.full_like(q, 7.0))
  ran = masked(name)[0]
  assert (ran.max() == 7.0) == (name == "one picture")
  monkeypatch.setattr(module, "flash_knows", lambda _: False)
  close(found, masked(name))


def test_a_row_without_a_picture_is_finite(kernel):
  mask = AttentionMask(TOKENS.at[1].set(0), TOKENS.at[1].set(0))
  assert np.isfinite(np.asarray(attention(*arrays(), mask), np.float32)).all()
  assert kernel


@pytest.mark.parametrize("case", ["float32", "wide heads", "short", "a cache", "an old GPU"])
def test_what_the_kernel_does_not_know_goes_elsewhere(kernel, monkeypatch, case):
  q, k, v = arrays(jnp.float32 if case == "float32" else jnp.bfloat16)
  if case == "wide heads":
    q, k, v = (jnp.concatenate([x] * 3, axis=-1) for x in (q, k, v))
  elif case == "short":
    q, k, v = (x[:, :127] for x in (q, k, v))
  mask = MASKS["causal"] if case == "float32" else None
  if case == "an old GPU":
    monkeypatch.setattr(flash, "compute_capability", lambda: 7.5)
  if case == "a cache":
    mask = AttentionMask(TOKENS, TOKENS, jnp.arange(T))
  assert np.isfinite(np.asarray(attention(q, k, v, mask), np.float32)).all()
  assert not kernel


@pytest.mark.parametrize(("name", "found"), [("9.0", 9.0), ("12.1", 12.1), ("gfx90a", 0.0)])
def test_what_a_gpu_can_do(monkeypatch, name, found):
  class Device:
    compute_capability = name

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  assert flash.compute_capability() == found
  monkeypatch.setattr(jax, "local_devices", lambda: [object()])
  assert flash.compute_capability() == 0.0


def test_completions_go_behind_their_prompts(kernel, monkeypatch):
  found = packed()
  rows = (GROUP * B, PROMPT + (T - PROMPT) // GROUP)
  assert kernel == [{"implementation": "cudnn", "queries": rows, "is_causal": True}]
  monkeypatch.setattr(group_attention, "flash_knows", lambda _: False)
  monkeypatch.setattr(module, "flash_knows", lambda _: False)
  wanted = packed()
  close(found, wanted)
  assert len(kernel) == 1 and all(np.abs(x).max() > 0.5 for x in wanted)


@NEEDS_A_GPU
@pytest.mark.parametrize("name", MASKS)
def test_the_kernel_equals_the_chunks(monkeypatch, name):
  found, mask = masked(name), MASKS[name]
  text = jax.jit(lambda *x: attention(*x, mask)).lower(*arrays()).compile().as_text()
  assert "cudnn" in text
  assert f"{T},{T}" not in text
  monkeypatch.setattr(module, "flash_knows", lambda _: False)
  close(found, masked(name), 0.05)


@NEEDS_A_GPU
def test_the_kernel_equals_scores_in_memory_in_windows(monkeypatch):
  rng = np.random.default_rng(0)
  x = [jnp.asarray(rng.normal(size=(8, 196, 8, 72)), jnp.bfloat16) for _ in range(3)]

  def run() -> list[np.ndarray]:
    def loss(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
      out = attention(*x).astype(jnp.float32)
      return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*x)
    return [np.asarray(x, np.float32) for x in (out, *grads)]

  found = run()
  monkeypatch.setattr(module, "flash_knows", lambda _: False)
  close(found, run(), 0.05)


@NEEDS_A_GPU
def test_the_kernel_equals_the_chunks_in_packed_sequences(monkeypatch):
  found = packed()
  monkeypatch.setattr(group_attention, "flash_knows", lambda _: False)
  monkeypatch.setattr(module, "flash_knows", lambda _: False)
  close(found, packed(), 0.05)
