"""Products of few rows on CPUs against the plain one, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrt_jax.ops import linear as module
from vrt_jax.ops.linear import FEW_ROWS, linear


def arrays(rows: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
  rng = np.random.default_rng(rows)
  x, weight = rng.normal(size=(1, rows, 24)), rng.normal(size=(16, 24))
  return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


def value_and_grads(x, weight):
  def loss(x, weight):
    out = linear(x, weight)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, weight)
  return out, *grads


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_plain_product(monkeypatch, rows, dtype):
  found = value_and_grads(*arrays(rows, dtype))
  monkeypatch.setattr(module, "on_one_cpu", lambda: False)
  plain = value_and_grads(*arrays(rows, dtype))
  for a, b in zip(found, plain, strict=True):
    assert (a.shape, a.dtype) == (b.shape, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_bfloat16_sums_are_float32():
  x = jnp.ones((1, 4096), jnp.bfloat16)
  weight = jnp.full((1, 4096), 1 + 2**-7, jnp.bfloat16)
  for rows in (1, 3):
    out = linear(jnp.repeat(x, rows, axis=0), weight, jnp.float32)
    np.testing.assert_array_equal(out, np.full((rows, 1), 4128.0))


def test_few_rows_are_the_right_operand_on_cpus_alone(monkeypatch):
  """The matrix is read as it lies: rows come to it as columns."""

  def program(rows: int) -> str:
    return str(jax.make_jaxpr(lambda x, weight: linear(x, weight))(*arrays(rows)))  # traced anew

  assert "optimization_barrier" in program(2)
  assert "optimization_barrier" not in program(FEW_ROWS + 1)
  monkeypatch.setattr(module, "on_one_cpu", lambda: False)
  assert "optimization_barrier" not in program(2)
