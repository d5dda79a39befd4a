"""SFT losses and gradients against PyTorch autograd at given points, and against wrong recipes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.parity.errors import max_error
from tests.parity.sft_case import Rules, points, sides, torch_gradients, torch_losses
from vrt_jax.losses import mask as mask_module
from vrt_jax.runtime import make_mesh
from vrt_jax.train.optim import make_optimizer, trainable_filter
from vrt_jax.train.sft_step import sft_gradients
from vrt_jax.train.state import create_state

CONFIG = tiny.train_config()
LOSS = 1e-5
GRADIENT = 3e-4
GROUPS = ("lora_a", "lora_b", "text_hidden_fcs", "mask_decoder")
WITHOUT_GRADIENT = ("iou_prediction_head", "pred_obj_score_head", "output_hypernetworks_mlps.0")
"""Heads of the mask decoder that no loss reaches: the choice of a mask has no gradient."""

Gradients = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def ours() -> tuple[Gradients, dict[str, float]]:
  """(gradients by dotted name, loss parts) of one SFT step at the given points."""
  optimizer = make_optimizer(CONFIG.optim)
  mesh = make_mesh(CONFIG.mesh)
  state, frozen = create_state(sides()[2], optimizer, trainable_filter("adapters"), mesh)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mask_module, "uncertain_points", lambda *_: jnp.asarray(points()))
    step = jax.jit(functools.partial(sft_gradients, optim=CONFIG.optim, loss=CONFIG.sft))
    grads, metrics = step(state, frozen, jax.tree.map(jnp.asarray, tiny.batch()), jax.random.key(0))
  flat = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(grads)}
  return flat, {name: float(value) for name, value in metrics.items()}


def group(name: str) -> str:
  """Which of GROUPS a parameter belongs to."""
  (found,) = (g for g in GROUPS if g in name.split("."))
  return found


def gradient_errors(ours: Gradients, theirs: Gradients) -> dict[str, float]:
  """The largest difference in each group, in units of the parameter's largest gradient.

  The unit is at least a hundredth of the group's largest gradient: biases of keys, for one, have
  none but rounding.
  """
  assert ours.keys() == theirs.keys()
  largest = {g: max(np.abs(v).max() for n, v in theirs.items() if group(n) == g) for g in GROUPS}
  errors = dict.fromkeys(GROUPS, 0.0)
  for name, value in theirs.items():
    g = group(name)
    unit = max(np.abs(value).max(), 1e-2 * largest[g])
    error = max_error(ours[name], value.reshape(ours[name].shape)) / unit
    errors[g] = max(errors[g], error)
  return errors


def test_losses(ours):
  theirs = torch_losses(Rules())
  assert ours[1].keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[1][name] == pytest.approx(value.item(), rel=LOSS)
    assert value.item() > 0.1


def test_gradients(ours):
  theirs = torch_gradients(torch_losses(Rules())["loss"])
  for name, value in theirs.items():
    reached = not any(part in name for part in WITHOUT_GRADIENT)
    assert value.any() == ours[0][name].any() == reached, name
  assert max(gradient_errors(ours[0], theirs).values()) < GRADIENT


@pytest.mark.parametrize(
  ("wrong", "part"),
  [
    ({"shift": 0}, "loss/text"),
    ({"mean_of_samples": True}, "loss/text"),
    ({"lora_scale": 1.0}, "loss/text"),
    ({"align_corners": True}, "loss/mask_bce"),
    ({"padding_mode": "border"}, "loss/mask_bce"),
    ({"post_norm": True}, "loss/mask_bce"),
    ({"smooth": 0.0}, "loss/mask_dice"),
    ({"bce_weight": 1.0}, "loss"),
    ({"dice_weight": 1.0}, "loss"),
  ],
  ids=str,
)
def test_wrong_recipes_fail(ours, wrong, part):
  theirs = torch_losses(Rules(**wrong))
  assert ours[1][part] != pytest.approx(theirs[part].item(), rel=30 * LOSS)
  errors = gradient_errors(ours[0], torch_gradients(theirs["loss"]))
  assert max(errors.values()) > 3 * GRADIENT
