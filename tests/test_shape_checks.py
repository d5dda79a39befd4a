"""Functions of the package are checked against the shapes that they state."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from shape_checks import checked

from vrt_jax.losses.token import cross_entropy
from vrt_jax.ops.rope import apply_rope

HIDDEN, HEAD = jnp.zeros((2, 5, 8)), jnp.zeros((11, 8))
LABELS = jnp.zeros((2, 5), jnp.int32)


def test_stated_shapes_pass():
  cross_entropy(HIDDEN, HEAD, LABELS)
  jax.jit(cross_entropy)(np.asarray(HIDDEN), HEAD, LABELS)


@pytest.mark.parametrize(
  "arguments",
  [
    (HIDDEN[0], HEAD, LABELS),
    (HIDDEN, HEAD.T, LABELS),
    (HIDDEN, HEAD, LABELS[:, 1:]),
    (HIDDEN, HEAD, LABELS.astype(float)),
  ],
)
def test_other_shapes_and_dtypes_fail(arguments):
  with pytest.raises(jaxtyping.TypeCheckError):
    cross_entropy(*arguments)
  with pytest.raises(jaxtyping.TypeCheckError):
    jax.jit(cross_entropy)(*arguments)


def test_a_dimension_has_one_size_in_a_call():
  angles = jnp.zeros((2, 5, 4))
  apply_rope(jnp.zeros((2, 5, 3, 8)), angles, angles)
  with pytest.raises(jaxtyping.TypeCheckError):
    apply_rope(jnp.zeros((2, 5, 3, 8)), angles, angles[..., :2])


def test_results_are_checked():
  def halves(x: jaxtyping.Float[jax.Array, "T"]) -> tuple[jaxtyping.Float[jax.Array, "T"], str]:
    return x[::2], "half"

  run = jaxtyping.jaxtyped(halves, typechecker=checked)
  with pytest.raises(jaxtyping.TypeCheckError):
    run(jnp.zeros(4))
  assert run(jnp.zeros(1))[1] == "half"
