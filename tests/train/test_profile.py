"""Traces of some steps."""

import jax.numpy as jnp

from vrt_jax.train.profile import NUM_STEPS, Profile


def run(workdir, first_step: int, last: int) -> list:
  with Profile(workdir, first_step) as profile:
    for step in range(1, last + 1):
      profile.before(step)
      jnp.ones(4).sum().block_until_ready()
  return list(workdir.rglob("*.xplane.pb"))


def test_a_trace_is_written_once(tmp_path):
  assert len(run(tmp_path, 2, 2 + NUM_STEPS + 2)) == 1


def test_a_run_that_ends_within_the_trace_writes_it(tmp_path):
  assert len(run(tmp_path, 2, 3)) == 1


def test_no_trace_by_default(tmp_path):
  assert run(tmp_path, 0, 4) == []
