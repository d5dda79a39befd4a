"""The pretraining scripts: what they know of objects, and their stages end to end."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import pretrain_language, pretrain_perception
from scripts.described import (
  NUM_FEATURES,
  PROMPTS_FILE,
  WORDS,
  describe,
  feature_loss,
  load_prompts,
  token_features,
)
from vrt_jax import model_directory
from vrt_jax.data import shapes
from vrt_jax.models.sa2va import Sa2VA


def test_describe():
  mask = np.zeros((4, 8), np.uint8)
  mask[1, 6:] = 1
  features = describe("small striped red key", mask)
  np.testing.assert_allclose(features[:2], [2 * 7 / 8 - 1, 2 * 1.5 / 4 - 1])
  named = {WORDS[i] for i in np.flatnonzero(features[2:])}
  assert named == {"small", "striped", "red", "key"}


def test_describe_refuses_unknown_words():
  with pytest.raises(ValueError, match="pink"):
    describe("pink key", np.ones((2, 2)))


def test_token_features_take_the_largest_object_of_a_token():
  masks = np.zeros((2, 4, 8), bool)
  masks[0, :2, :2] = True  # 4 cells of the first token
  masks[1, :, 2:4] = True  # 4 + 4 cells of the first column's tokens
  masks[0, 0, 2] = masks[1, 0, 2] = False
  features = np.arange(2 * NUM_FEATURES, dtype=np.float32).reshape(2, -1) + 1
  tokens, covered = token_features(masks, features, rows=2, columns=2)
  assert tokens.shape == (4, NUM_FEATURES)
  np.testing.assert_array_equal(tokens[0], features[0])
  np.testing.assert_array_equal(tokens[2], features[1])
  assert covered.tolist() == [True, False, True, False]
  assert not tokens[1].any() and not tokens[3].any()


def test_feature_loss():
  features = np.zeros((1, 3, NUM_FEATURES), np.float32)
  features[0, 0, :3] = [0.5, -0.5, 1.0]
  placed, valid = jnp.array([[True, False, False]]), jnp.array([[True, True, False]])
  right = np.where(features[..., 2:] > 0, 20.0, -20.0)
  right = jnp.asarray(np.concatenate([features[..., :2], right], -1))
  loss, metrics = feature_loss(right, features, placed, valid)
  assert loss < 1e-6 and metrics["told"] == 1.0 and metrics["place"] < 1e-6
  wrong_where_not_valid = right.at[0, 2].set(7.0)
  assert feature_loss(wrong_where_not_valid, features, placed, valid)[0] == loss
  moved = right.at[0, 0, 0].add(0.4)
  loss, metrics = feature_loss(moved, features, placed, valid)
  np.testing.assert_allclose(loss, 10 * 0.4**2, rtol=1e-4)
  np.testing.assert_allclose(metrics["place"], 0.4 / 2 / 2**0.5, rtol=1e-5)
  assert feature_loss(-right, features, placed, valid)[1]["told"] == 0.0


@pytest.mark.slow
def test_stages(tmp_path):
  shapes.write_shapes(tmp_path, 8, 0, 0, task="refer", progress=False)
  data = str(tmp_path / "shapes_train-*.tfrecord")
  eyes, words, hints = (tmp_path / name for name in ("eyes", "words", "hints"))
  pretrain_perception.train(
    pretrain_perception.Args(data=data, out=eyes, steps=2, batch_size=2, objects=2)
  )
  pretrain_language.train(
    pretrain_language.Args(base=eyes, data=data, out=words, steps=2, batch_size=2)
  )
  pretrain_perception.train(
    pretrain_perception.Args(
      data=data, base=words, out=hints, steps=2, batch_size=2, objects=2, place_noise=0.3
    )
  )
  models = [model_directory.load(str(path)).model for path in (eyes, words, hints)]

  def changes(read: Callable[[Sa2VA], jax.Array]) -> list[bool]:
    values = [np.asarray(read(model)) for model in models]
    return [not np.array_equal(a, b) for a, b in itertools.pairwise(values)]

  assert changes(lambda m: m.sam2.mask_decoder.iou_token.weight[...]) == [False, True]
  assert changes(lambda m: m.qwen.language_model.embed_tokens.weight[...]) == [True, False]
  assert changes(lambda m: m.qwen.visual.patch_embed.proj.weight[...]) == [True, False]
  prompts = [load_prompts(path / PROMPTS_FILE, 64) for path in (eyes, words, hints)]
  for net in prompts[1:]:
    np.testing.assert_array_equal(net.fc1.weight[...], prompts[0].fc1.weight[...])
