"""Step times, and the guard against compiling a shape twice."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from vrt_jax.train import step_clock
from vrt_jax.train.step_clock import CompiledOnce, SkipLimit, StepClock


def test_clock_counts_tokens_of_steps():
  clock = StepClock()
  batch = tiny.batch()
  clock.count(batch)
  clock.count(batch)
  values = clock.read()
  tokens = 2 * int(batch.text.token_mask.sum())
  assert values["tokens_per_second"] * values["step_seconds"] * 2 == pytest.approx(tokens)


def test_clock_measures_parts_of_a_step():
  clock = StepClock(shares=3)
  for _ in range(2):
    for _ in range(2):  # twice a step: a refill
      with clock.part("rollout"):
        time.sleep(0.02)
    clock.count_tokens(50)
  values = clock.read()
  assert 0.04 <= values["rollout_seconds"] <= values["step_seconds"]
  assert values["tokens_per_second"] * values["step_seconds"] * 2 == pytest.approx(100)
  clock.count_tokens(1)
  assert "rollout_seconds" not in clock.read()


def test_known_shapes_may_not_compile_again():
  step = CompiledOnce(jax.jit(lambda state, frozen, batch, key: (state + frozen, {})))
  batch = jnp.zeros(3)
  step(jnp.zeros(()), jnp.zeros(()), batch, None)
  step(jnp.zeros(()), jnp.zeros(()), batch, None)
  assert step.compiles == 1
  step(jnp.zeros(()), jnp.zeros(()), jnp.zeros(4), None)
  assert step.compiles == 2
  with pytest.raises(RuntimeError, match="compiled again"):
    step(jnp.zeros(5), jnp.zeros(()), batch, None)


def test_compiling_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch):
  trimmed = []
  monkeypatch.setattr(
    step_clock.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trimmed.append)
  )
  step = CompiledOnce(jax.jit(lambda a, b, c, *, by: a + b + by * c, static_argnames="by"), by=2)
  for _ in range(2):
    assert step(jnp.zeros(3), jnp.zeros(3), jnp.ones(3)).tolist() == [2, 2, 2]
  assert (trimmed, step.compiles) == ([0], 1)
  monkeypatch.setattr(step_clock.ctypes, "CDLL", lambda _: SimpleNamespace())  # no glibc
  assert step(jnp.zeros(1), jnp.zeros(1), jnp.ones(1)).tolist() == [2]


def test_skipped_steps_end_a_run_one_step_late():
  limit = SkipLimit(1)
  for step, skipped in ((1, 0), (2, 1), (3, 1), (4, 2)):
    limit.check(step, jnp.int32(skipped))
  message = r"step 4: the loss or gradient of 2 steps was not finite \(limit 1, optim.max_skipped"
  with pytest.raises(FloatingPointError, match=message):
    limit.check(5, jnp.int32(2))
  with pytest.raises(FloatingPointError):
    limit.finish()
  SkipLimit(0).finish()


def test_a_clock_of_one_share_counts_all():
  one, two = StepClock(), StepClock(shares=2)
  for clock in (one, two):
    clock.count(tiny.batch())
  rates = [clock.read() for clock in (one, two)]
  tokens = [r["tokens_per_second"] * r["step_seconds"] for r in rates]
  assert tokens[1] == pytest.approx(2 * tokens[0])
