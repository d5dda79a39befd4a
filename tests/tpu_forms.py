"""The forms that programs take for TPUs, on CPUs: the same branches, with interpreted kernels."""

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import jax
from jax import Array

from vrt_jax.generate import decode
from vrt_jax.ops import attention, group_attention, sharding, splash


@contextlib.contextmanager
def tpu_forms() -> Iterator[list[tuple[int, ...]]]:
  """What is traced inside is traced as for TPUs; gives the shapes of its kernels' queries.

  The bounds from which TPUs have kernels and stages of decoding are those of tiny models.
  """
  seen: list[tuple[int, ...]] = []
  run = splash._splash

  def interpreted(q: Array, *rest: object) -> Array:
    rest = [*rest]
    rest[5] = True
    seen.append(q.shape)
    return run(q, *rest)

  importers = [
    module
    for name, module in list(sys.modules.items())
    if name.startswith("vrt_jax.") and vars(module).get("platform") is sharding.platform
  ]
  with contextlib.ExitStack() as stack:
    for module in importers:
      stack.enter_context(mock.patch.object(module, "platform", lambda: "tpu"))
    stack.enter_context(mock.patch.object(splash, "_splash", interpreted))
    for module in (attention, group_attention):
      stack.enter_context(mock.patch.object(module, "MAX_UNCHUNKED", 32))
    stack.enter_context(mock.patch.object(decode, "MIN_STAGED", 4))
    jax.clear_caches()
    yield seen
  jax.clear_caches()
