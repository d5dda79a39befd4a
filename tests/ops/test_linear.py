"""Products of few rows on CPUs against the plain one, with gradients."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import processes
from vrt_jax.ops import linear as module
from vrt_jax.ops.linear import FEW_ROWS, TPU_FEW_ROWS, linear, low_rank


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
  monkeypatch.setattr(module, "platform", lambda: "tpu")
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


def products(function: Callable, *arrays: jax.Array) -> list[tuple[list, tuple[str, ...]]]:
  """(shapes of the factors, dtypes of factors and product) of a function's matrix products."""

  def of(jaxpr) -> list:
    found = []
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        shapes = [v.aval.shape for v in equation.invars]
        dtypes = (v.aval.dtype.name for v in (*equation.invars, *equation.outvars))
        found.append((shapes, tuple(dtypes)))
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        found += of(inner)
    return found

  return of(jax.make_jaxpr(lambda *xs: function(*xs))(*arrays).jaxpr)  # traced anew


def first_factors(rows: int, dtype=jnp.float32) -> list[tuple[int, ...]]:
  """Shapes of the left operands."""
  x, weight = arrays(rows, dtype)
  found = products(lambda x, weight: linear(x, weight), x, weight)
  return [shapes[0] for shapes, _ in found]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_few_rows_are_the_right_operand_on_cpus_alone(monkeypatch, dtype):
  """The matrix is read as it lies: the library brings the right operand into another order."""
  weight = arrays(2)[1].shape
  assert first_factors(2, dtype) == first_factors(FEW_ROWS, dtype) == [weight]
  if dtype == jnp.bfloat16:
    assert first_factors(1, dtype) == [weight]
  assert first_factors(FEW_ROWS + 1, dtype) != [weight]
  monkeypatch.setattr(module, "on_one_cpu", lambda: False)
  assert first_factors(2, dtype) != [weight]


@pytest.mark.parametrize("function", ["linear", "adapter"])
def test_on_cpus_products_of_16_bits_have_float32_sums(monkeypatch, function):
  """The compiler would widen the factors of others and multiply in float32."""
  if function == "linear":
    run, inputs = value_and_grads, arrays(FEW_ROWS + 1, jnp.bfloat16)
  else:
    run, inputs = adapter_gradients, adapter_arrays(jnp.bfloat16)
  narrow = ("bfloat16", "bfloat16", "float32")
  found = [dtypes for _, dtypes in products(run, *inputs)]
  assert len(found) >= 3 and found.count(narrow) >= 3
  if function == "linear":
    assert set(found) == {narrow}
  monkeypatch.setattr(module, "on_one_cpu", lambda: False)
  monkeypatch.setattr(module, "platform", lambda: "tpu")
  assert narrow not in [dtypes for _, dtypes in products(run, *inputs)]


def adapter_gradients(x, down, up):
  def loss(x, down, up):
    wide = low_rank(linear(x, down), up)
    return jnp.sum(jnp.sin(jax.nn.silu(wide).astype(jnp.float32)))

  return jax.grad(loss, argnums=(0, 1, 2))(x, down, up)


def adapter_arrays(dtype=jnp.float32) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shapes = ((2, 300, 24), (4, 24), (160, 4))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_adapter_has_the_plain_gradients(monkeypatch, dtype):
  arrays = adapter_arrays(dtype)
  found = jax.jit(adapter_gradients)(*arrays)
  monkeypatch.setattr(module, "platform", lambda: "tpu")
  plain = jax.jit(lambda *xs: adapter_gradients(*xs))(*arrays)  # traced anew
  for a, b, x in zip(found, plain, arrays, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype) == (x.shape, dtype)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= (1e-5 if dtype == jnp.float32 else 0.03) * np.abs(b).max()


def test_on_cpus_an_adapter_does_not_transpose_the_wide_gradient(monkeypatch):
  def transposes() -> bool:
    compiled = jax.jit(lambda *xs: adapter_gradients(*xs)).lower(*adapter_arrays()).compile()
    return "f32[160,600]" in compiled.as_text()

  assert not transposes()
  monkeypatch.setattr(module, "platform", lambda: "tpu")
  assert transposes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
@pytest.mark.parametrize("kind", ["cpu", "tpu"])
def test_heads_are_a_product_by_their_own_dimension(monkeypatch, kind, rows, dtype):
  x, weight = arrays(rows, dtype)
  heads = weight.reshape(4, 4, 24)
  monkeypatch.setattr(module, "platform", lambda: kind)
  monkeypatch.setattr(module, "on_one_cpu", lambda: kind == "cpu")
  for function in (linear, low_rank):
    found = function(x, heads)
    assert (found.shape, found.dtype) == ((1, rows, 4, 4), dtype)
    plain = function(x, weight)
    np.testing.assert_allclose(found.reshape(plain.shape), plain, rtol=1e-6, atol=1e-6)


def test_on_a_mesh_every_device_sums_its_own_rows_for_an_adapter(tmp_path: Path):
  found = processes.found_by("tests.ops.adapter_on_mesh", tmp_path / "found.json")
  for error, summed, plain in found.values():
    assert error < 1e-5
    assert summed == [True, True]
    assert plain == [False, False]


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("rows", [1, 3, TPU_FEW_ROWS, TPU_FEW_ROWS + 1])
def test_few_rows_on_tpus_read_a_matrix_as_it_lies(monkeypatch, rows, heads):
  """Without heads, and eight rows at least; many rows give heads themselves."""
  x, weight = arrays(rows)
  weight = weight.reshape(4, 4, 24) if heads else weight
  monkeypatch.setattr(module, "platform", lambda: "tpu")
  expected = value_and_grads(x, weight)
  monkeypatch.setattr(module, "on_tpu", lambda: True)
  jax.clear_caches()
  for a, b in zip(value_and_grads(x, weight), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  few = rows <= TPU_FEW_ROWS
  for function in (linear, low_rank):
    assert function(x, weight).shape == (1, rows, *weight.shape[:-1])
    (((left, right), _),) = products(function, x, weight)
    assert right == ((16, 24) if few else weight.shape)
    assert left == ((1, 8, 24) if rows == 1 else x.shape)


def test_rows_are_counted_by_device(monkeypatch):
  monkeypatch.setattr(module, "on_tpu", lambda: True)
  monkeypatch.setattr(module, "devices_of_batch", lambda size: 4)
  x, weight = jnp.ones((4, 1, 24)), jnp.ones((16, 24))
  (((left, _), _),) = products(linear, x, weight)
  assert left == (4, 8, 24)
  np.testing.assert_array_equal(linear(x, weight), np.full((4, 1, 16), 24.0))
