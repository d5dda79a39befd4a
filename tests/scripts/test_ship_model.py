"""Shipping a model in the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scripts import ship_model
from tests import tiny
from vrt_jax import model_directory


def test_the_shipped_model_is_the_trained_one_in_bfloat16(tmp_path, monkeypatch, capsys):
  loaded = tiny.loaded()
  model_directory.save(tmp_path / "model", loaded.model, loaded.tokenizer, loaded.image)
  args = ship_model.Args(model=tmp_path / "model", name="small", assets=tmp_path / "assets")
  shipped = model_directory.load(str(ship_model.ship(args)))
  assert "assets/small: 0." in capsys.readouterr().out
  pairs = zip(
    jax.tree.leaves(nnx.state(loaded.model, nnx.Param)),
    jax.tree.leaves(nnx.state(shipped.model, nnx.Param)),
    strict=True,
  )
  for trained, copy in pairs:
    assert np.array_equal(trained.astype(jnp.bfloat16), copy)

  monkeypatch.setattr(ship_model, "MAX_MB", 0.01)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ValueError, match="MB, above"):
    ship_model.ship(args)
  assert sorted(tmp_path.rglob("*")) == before
