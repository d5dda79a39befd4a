"""Random bits of rows: each its own, the same on any mesh, and as even as bits are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import processes
from vrt_jax.models.adapters import draw_dropouts
from vrt_jax.ops import random_bits as module
from vrt_jax.ops.random_bits import random_bits

SHAPE = (4, 128, 64)


@pytest.fixture(params=["cpu", "tpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setattr(module, "on_tpu", lambda: request.param == "tpu")
  return request.param


def bits(seed: int, shape: tuple[int, ...] = SHAPE, dtype: jnp.dtype = jnp.uint32) -> np.ndarray:
  return np.asarray(
    jax.jit(lambda key: random_bits(key, shape, dtype, lambda bits: bits))(jax.random.key(seed))
  )


@pytest.mark.parametrize("dtype", [jnp.uint16, jnp.uint32])
def test_bits_are_even_and_rows_and_keys_have_their_own(platform, dtype):
  found = bits(0, dtype=dtype)
  assert found.shape == SHAPE and found.dtype == dtype
  set_bits = np.unpackbits(found.view(np.uint8).reshape(-1, found.itemsize), axis=1)
  deviation = 0.5 / len(set_bits) ** 0.5
  assert np.abs(set_bits.mean(0) - 0.5).max() < 5 * deviation
  same = np.corrcoef(found.reshape(SHAPE[0], -1).astype(np.float64)) - np.eye(SHAPE[0])
  assert np.abs(same).max() < 5 / found[0].size ** 0.5
  np.testing.assert_array_equal(bits(0, dtype=dtype), found)
  assert (bits(1, dtype=dtype) != found).mean() > 0.99


def test_tpus_draw_by_hardware_and_a_row_whatever_the_others(platform):
  program = str(
    jax.make_jaxpr(lambda key: random_bits(key, SHAPE, jnp.uint32, lambda bits: bits))(
      jax.random.key(0)
    )
  )
  assert ("rng_bit_generator" in program or "rbg" in program) == (platform == "tpu")
  if platform == "tpu":
    np.testing.assert_array_equal(bits(0, (6, *SHAPE[1:]))[:4], bits(0))


def test_dropout_on_tpus_has_its_rate(monkeypatch):
  monkeypatch.setattr(module, "on_tpu", lambda: True)
  for count in (1, 2, 3):
    masks = draw_dropouts(jax.random.key(3), (8, 64, 256), 0.05, count)
    for mask in masks:
      assert abs(np.asarray(mask.keep).mean() - mask.keep_share) < 4 * (0.05 / 2**17) ** 0.5


def test_a_mesh_divides_the_drawing_and_changes_nothing(tmp_path):
  found = processes.found_by("tests.ops.bits_on_mesh", tmp_path / "found.json")
  assert found == {
    "1x4x1": {"8": [True, 2], "3": [True, 3]},
    "2x2x1": {"8": [True, 2], "3": [True, 3]},
    "1x2x2": {"8": [True, 4], "3": [True, 3]},
  }
