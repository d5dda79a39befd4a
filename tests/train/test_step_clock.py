"""Step times, and the guard against compiling a shape twice."""

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from vrt_jax.train.step_clock import CompiledOnce, StepClock


def test_clock_counts_tokens_of_steps():
  clock = StepClock()
  batch = tiny.batch()
  clock.count(batch)
  clock.count(batch)
  values = clock.read()
  tokens = 2 * int(batch.text.token_mask.sum())
  assert values["tokens_per_second"] * values["step_seconds"] * 2 == pytest.approx(tokens)


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
