"""In which order text is written and pictures are encoded."""

import threading

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.rl import group_case as case
from vrt_jax.generate import generation
from vrt_jax.generate.generation import Generation
from vrt_jax.generate.sampling import Sampling

PATIENCE_S = 60


def generate() -> Generation:
  return generation.generate(
    *nnx.split(tiny.loaded().model),
    case.inputs(),
    jax.random.key(0),
    max_new_tokens=4,
    max_masks=2,
    sampling=Sampling(),
    ids=case.ids(),
  )


def spied(name: str, monkeypatch: pytest.MonkeyPatch, before) -> None:
  """Calls `before` with the name first."""
  function = getattr(generation, name)

  def called(*args: object, **options: object) -> object:
    before(name)
    return function(*args, **options)

  monkeypatch.setattr(generation, name, called)


def test_one_cpu_does_both_at_a_time(monkeypatch: pytest.MonkeyPatch):
  """Each waits until the other has begun; masks come after both."""
  both = threading.Barrier(2, timeout=PATIENCE_S)
  for name in ("write_text", "encode_images"):
    spied(name, monkeypatch, lambda name: both.wait())
  spied("decode_masks", monkeypatch, lambda name: both.abort())
  generate()
  assert both.broken


def test_several_devices_do_one_after_the_other_with_the_same_result(
  monkeypatch: pytest.MonkeyPatch,
):
  """Processes that share programs must start them in one order."""
  expected = generate()
  monkeypatch.setattr(generation, "on_one_cpu", lambda: False)
  order: list[tuple[str, int]] = []
  for name in ("write_text", "encode_images", "decode_masks"):
    spied(name, monkeypatch, lambda name: order.append((name, threading.get_ident())))
  out = generate()
  here = threading.get_ident()
  assert order == [(name, here) for name in ("write_text", "encode_images", "decode_masks")]
  jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_an_error_of_the_encoder_is_raised(monkeypatch: pytest.MonkeyPatch):
  def fail(name: str) -> None:
    raise RuntimeError("no memory")

  spied("encode_images", monkeypatch, fail)
  with pytest.raises(RuntimeError, match="no memory"):
    generate()
