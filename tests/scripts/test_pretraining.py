"""The pretraining scripts: what they know of objects, and their stages end to end."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scripts import pretrain_grounding, pretrain_language, pretrain_perception
from scripts.described import (
  NUM_FEATURES,
  PROMPTS_FILE,
  WORDS,
  PromptNet,
  describe,
  feature_loss,
  load_prompts,
  token_features,
)
from vrt_jax import model_directory
from vrt_jax.config import TrainConfig
from vrt_jax.data import shapes
from vrt_jax.data.records import serialize_train
from vrt_jax.data.transforms import object_mask
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.models.sam2.prompt_encoder import RandomFourier
from vrt_jax.train.setup import base_model
from vrt_jax.types import IGNORE_INDEX


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


def test_a_prompt_is_an_encoded_point_plus_layers():
  places = RandomFourier(8, nnx.Rngs(0))
  net = PromptNet(8, places, nnx.Rngs(1))
  net.fc2.weight[...] = jnp.zeros_like(net.fc2.weight[...])
  features = np.zeros((3, NUM_FEATURES), np.float32)
  features[:, :2] = [[-1, -1], [0, 0.5], [1, 1]]
  np.testing.assert_allclose(
    net(features), places(jnp.array([[0, 0], [0.5, 0.75], [1, 1]])), atol=1e-6
  )


def test_hint_moves_places_and_drops_words():
  args = pretrain_perception.Args(data="", out="", place_noise=0.2, word_dropout=0.5)
  features = jnp.ones((200, 5, NUM_FEATURES))
  hinted = pretrain_perception.hint(features, jax.random.key(0), args)
  moved = np.abs(np.asarray(hinted[..., :2] - 1.0))
  assert 0.05 < moved.mean() < 0.15 and moved.min() > 0
  words = np.asarray(hinted[..., 2:])
  assert (words == words[..., :1]).all() and 0.4 < words.mean() < 0.6


def test_shifted_answers():
  labels = jnp.array([[IGNORE_INDEX, IGNORE_INDEX, 5, 6], [IGNORE_INDEX, 7, IGNORE_INDEX, 8]])
  ids = jnp.broadcast_to(jnp.arange(4), (3, 2, 4))
  moved = np.asarray(pretrain_language.shift_answers(ids, labels, jax.random.key(1)))
  first, second = moved[0, 0, 2] - 2, moved[0, 1, 1] - 1
  assert 0 <= first <= pretrain_language.MAX_SHIFT and first != second
  for axis in moved:
    np.testing.assert_array_equal(axis[0], [0, 1, 2 + first, 3 + first])
    np.testing.assert_array_equal(axis[1], [0, 1 + second, 2 + second, 3 + second])


@pytest.mark.parametrize("framed", [False, True])
def test_named_tokens_tell_of_the_next_object(framed):
  record = shapes.refer_sample(np.random.default_rng(4), "train", in_frame=framed)
  loaded = base_model(TrainConfig(base=""))
  data = pretrain_language.FRAMED if framed else pretrain_language.PLAIN
  to_named = pretrain_language.ToNamed(loaded.tokenizer, loaded.image, data)
  example, features, described = to_named.random_map(
    serialize_train(record), np.random.default_rng(0)
  )
  seg = np.flatnonzero(example.input_ids == loaded.tokenizer.seg_id)
  candidate = record.annotation["generated_ver_data"]["candidates"][0]
  tags = re.findall(r"<obj\d+>", candidate["reasoning"] + candidate["answer_caption"])
  assert len(tags) == len(seg) >= 2
  objects = record.annotation["original_annotation"]["objects_anns"]
  start = np.flatnonzero(example.labels != IGNORE_INDEX)[0]
  for i, (tag, end) in enumerate(zip(tags, seg, strict=True)):
    begin = start - 1 if i == 0 else seg[i - 1] + 1
    rle = objects[tag]["segmentation"]
    mask = object_mask(rle, tuple(rle["size"]), tag)
    expected = describe(objects[tag]["caption"], mask)
    assert described[begin : end + 1].all()
    np.testing.assert_array_equal(
      features[begin : end + 1], np.tile(expected, (end + 1 - begin, 1))
    )
  assert not described[: start - 1].any() and not described[seg[-1] + 1 :].any()


def test_phrases_name_one_object_each():
  captions = ["small plain red key", "plain red key", "large dotted blue lock"]
  found = [
    pair
    for i in range(50)
    for pair in pretrain_grounding.phrases(captions, np.random.default_rng(i))
  ]
  for phrase, index in found:
    words = set(phrase.split()) - {"object"}
    assert [words <= set(c.split()) for c in captions].count(True) == 1
    assert words <= set(captions[index].split())
  said = {phrase for phrase, _ in found}
  assert {"lock", "blue object", "small key"} <= said
  assert not any(index == 1 for _, index in found)  # all its words are true of the first as well


def test_phrases_end_where_their_objects_are_told():
  record = shapes.refer_sample(np.random.default_rng(4), "train")
  loaded = base_model(TrainConfig(base=""))
  to_phrases = pretrain_grounding.ToPhrases(loaded.tokenizer, loaded.image)
  prompt, features, ends = to_phrases.random_map(serialize_train(record), np.random.default_rng(0))
  objects = record.annotation["original_annotation"]["objects_anns"].values()
  captions = [set(o["caption"].split()) for o in objects]
  text = loaded.tokenizer.decode(prompt.input_ids).split("<|vision_end|>\n")[1].split(".")[0]
  said = text.split(", ")
  assert len(said) == ends.sum() > 3 and not features[~ends].any()
  for phrase, end in zip(said, np.flatnonzero(ends), strict=True):
    told = {WORDS[i] for i in np.flatnonzero(features[end, 2:])}
    assert told in captions and set(phrase.split()) - {"the", "object"} <= told
    assert phrase.endswith(loaded.tokenizer.decode([prompt.input_ids[end]]).strip())


@pytest.mark.slow
def test_stages(tmp_path):
  shapes.write_shapes(tmp_path, 8, 0, 0, task="refer", progress=False)
  data = str(tmp_path / "shapes_train-*.tfrecord")
  shapes.write_shapes(tmp_path / "framed", 8, 0, 0, task="framed", progress=False)
  framed = str(tmp_path / "framed" / "shapes_train-*.tfrecord")
  eyes, search, words, traces = (tmp_path / n for n in ("eyes", "search", "words", "traces"))
  pretrain_perception.train(
    pretrain_perception.Args(data=data, out=eyes, steps=2, batch_size=2, objects=2)
  )
  pretrain_grounding.train(
    pretrain_grounding.Args(base=eyes, data=data, out=search, steps=2, batch_size=2)
  )
  pretrain_language.train(
    pretrain_language.Args(base=search, data=data, out=words, steps=2, batch_size=2)
  )
  pretrain_language.train(
    pretrain_language.Args(base=words, data=framed, out=traces, framed=True, steps=2, batch_size=2)
  )
  models = [model_directory.load(str(path)).model for path in (eyes, search, words, traces)]

  def changes(read: Callable[[Sa2VA], jax.Array], first: int = 0, last: int = 2) -> bool:
    return not np.array_equal(*(np.asarray(read(models[i])) for i in (first, last)))

  def projections(model: Sa2VA) -> jax.Array:
    return model.qwen.language_model.layers.self_attn.q_proj.weight[...]

  assert changes(lambda m: projections(m)[:3], 0, 1)
  assert not changes(lambda m: projections(m)[3:], 0, 1)
  assert not changes(lambda m: m.qwen.visual.patch_embed.proj.weight[...], 0, 1)
  assert not changes(lambda m: m.sam2.mask_decoder.iou_token.weight[...])
  assert changes(lambda m: m.qwen.language_model.embed_tokens.weight[...])
  assert changes(lambda m: m.qwen.language_model.embed_tokens.weight[...], 2, 3)
  assert changes(lambda m: m.qwen.visual.patch_embed.proj.weight[...])
  nets = [load_prompts(path / PROMPTS_FILE, 64) for path in (eyes, traces)]
  features = np.random.default_rng(0).normal(size=(4, NUM_FEATURES)).astype(np.float32)
  np.testing.assert_array_equal(nets[0](features), nets[1](features))
  np.testing.assert_array_equal(
    nets[0].places.positional_encoding_gaussian_matrix[...],
    models[0].sam2.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix[...],
  )
