"""What a run starts from: workdir, data, tokenizer and base model."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from vrt_jax import model_directory
from vrt_jax.data.records import TFRecordSource, parse_eval, parse_train
from vrt_jax.train import setup
from vrt_jax.train.setup import (
  base_model,
  check_workdir,
  data_patterns,
  first_difference,
  with_adapters,
  write_config,
)

CONFIG = tiny.train_config()


def test_workdir_records_the_configuration_and_refuses_another(tmp_path: Path):
  workdir = tmp_path / "runs" / "one"
  check_workdir(CONFIG, workdir)  # not there yet
  write_config(CONFIG, workdir)
  recorded = json.loads((workdir / "config.json").read_text())
  assert recorded["optim"]["learning_rate"] == 1e-2
  assert recorded["data"]["buckets"] == [[384, 64]]
  check_workdir(CONFIG, workdir)  # the same run goes on
  other = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, learning_rate=2e-2))
  message = r"one holds a run with optim.learning_rate = 0.01, not 0.02: choose another --workdir"
  with pytest.raises(ValueError, match=message):
    check_workdir(other, workdir)
  (workdir / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    check_workdir(CONFIG, workdir)


def test_first_difference():
  assert first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) is None
  assert first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == ("b.c", 2, 3)
  assert first_difference({"a": 1}, {}) == ("a", 1, None)


def test_named_data_is_taken_as_it_is(tmp_path: Path):
  data = dataclasses.replace(CONFIG.data, train="x-*", eval="y")
  assert data_patterns(dataclasses.replace(CONFIG, data=data), tmp_path) == ("x-*", "y")
  data = dataclasses.replace(data, eval="")
  assert data_patterns(dataclasses.replace(CONFIG, data=data), tmp_path) == ("x-*", "")
  assert not list(tmp_path.iterdir())


def test_the_shapes_world_is_made_once(tmp_path: Path):
  data = dataclasses.replace(CONFIG.data, shapes_train_samples=3, shapes_eval_samples=2)
  config = dataclasses.replace(CONFIG, data=data)
  train, held_out = data_patterns(config, tmp_path)
  sources = TFRecordSource(train), TFRecordSource(held_out)
  assert [len(s) for s in sources] == [3, 2]
  assert parse_train(sources[0][0]).key.startswith("shapes_train_trace_0_")
  assert parse_eval(sources[1][0]).class_ids
  times = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
  assert data_patterns(config, tmp_path) == (train, held_out)
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()} == times


def test_base_from_a_model_directory_with_fresh_adapters(tmp_path: Path):
  given = tiny.loaded()
  model_directory.save(tmp_path / "base", given.model, given.tokenizer, given.image)
  config = dataclasses.replace(CONFIG, base=str(tmp_path / "base"))
  base = base_model(config)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(base.model), nnx.state(given.model))
  assert base.image == given.image
  adapted = with_adapters(base, config)
  assert adapted.model.config.lora == tiny.LORA
  names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(adapted.model))}
  assert {"lora_a", "lora_b"} <= names
  plain = dataclasses.replace(config, model=tiny.MODEL)
  assert with_adapters(base, plain).model is base.model


def test_base_that_is_missing(tmp_path: Path):
  config = dataclasses.replace(CONFIG, base=str(tmp_path / "none"))
  with pytest.raises(ValueError, match="none is not a model directory"):
    base_model(config)


def test_random_weights_with_a_given_tokenizer(tmp_path: Path):
  tiny.tokenizer().save(tmp_path)
  text = dataclasses.replace(CONFIG.model.text, vocab_size=300)
  small = dataclasses.replace(CONFIG.model, text=text)
  config = dataclasses.replace(CONFIG, tokenizer=str(tmp_path), model=small)
  with pytest.raises(ValueError, match=r"tokenizer has 512 tokens, model.text.vocab_size is 300"):
    base_model(config)
  config = dataclasses.replace(CONFIG, tokenizer=str(tmp_path))
  base = base_model(config)
  assert base.tokenizer.encode("a red key") == tiny.tokenizer().encode("a red key")
  assert base.model.config.text.vocab_size == 512


def test_a_tokenizer_is_trained_on_the_shapes_texts(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(setup, "CORPUS_SAMPLES", 40)
  made = setup.shapes_tokenizer(CONFIG)
  assert 500 < made.vocab_size <= 512  # equal merges of a small corpus share an entry
  assert len(made.encode(" circle")) < len(" circle")
  assert made.encode("[SEG]") == [made.seg_id]
