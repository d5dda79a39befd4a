"""What a user can get wrong ends with one line that starts with "error: ", and exit status 1."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval import score, vrt_bench
from scripts import ship_model
from tests import tiny
from vrt_jax import cli, model_directory
from vrt_jax import predict as predict_command
from vrt_jax.data.records import TrainRecord
from vrt_jax.train import __main__ as train_command

RECIPE = """
from tests import tiny

def get_config():
  return tiny.train_config(base={base!r})
"""


def run_predict() -> None:
  args = cli.parse(predict_command.Args, sys.argv[1:], "predict")
  predict_command.predict(args)


def run_ship() -> None:
  ship_model.ship(cli.parse(ship_model.Args, sys.argv[1:], "ship_model"))


@pytest.fixture
def failure(monkeypatch, capsys):
  """Runs a command that must fail and gives its one line without "error: "."""

  def run(main: Callable[[], None], *args: object) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
      cli.run(main)
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:]
    assert not any("Traceback" in line or "│" in line for line in lines[:-1])
    return errors[0].removeprefix("error: ")

  return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("checkpoint") / "model"
  loaded = tiny.loaded()
  model_directory.save(path, loaded.model, loaded.tokenizer, loaded.image)
  return path


@pytest.fixture
def recipe(tmp_path, checkpoint) -> Path:
  path = tmp_path / "recipe.py"
  path.write_text(RECIPE.format(base=str(checkpoint)))
  return path


@pytest.fixture
def picture(tmp_path) -> Path:
  path = tmp_path / "picture.jpg"
  path.write_bytes(tiny.eval_record(0).image)
  return path


@pytest.fixture
def records(tmp_path) -> Path:
  path = tmp_path / "train.tfrecord"
  tiny.write_train(path, [tiny.train_record(0), tiny.train_record(1)])
  return path


def broken_files(folder: Path, good: Path) -> dict[str, Path]:
  """Data files that cannot be read, by what the message says."""
  files = {"no file matches": folder / "missing.tfrecord"}
  files["empty TFRecord file"] = folder / "empty.tfrecord"
  files["empty TFRecord file"].touch()
  files["truncated record"] = folder / "truncated.tfrecord"
  files["truncated record"].write_bytes(good.read_bytes()[:-9])
  files["corrupt length checksum"] = folder / "other.tfrecord"
  files["corrupt length checksum"].write_bytes(b"this is no TFRecord file at all")
  return files


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--optim.learning-rte", 1], "unknown option --optim.learning-rte"),
    (["--optim.steps", "abc"], "Error parsing --optim.steps: .*'abc'"),
    (["--optim.steps"], "--optim.steps(: expected 1 argument|')"),
    (["--optim.trainable", "some"], "invalid choice 'some' .*'adapters', 'all'"),
    (["stray"], "unknown option stray"),
    (["--workdir"], "--workdir: expected one argument"),
    (["--config", "missing.py"], "recipe missing.py does not exist"),
  ],
)
def test_train_arguments(failure, args, message):
  assert re.search(message, failure(train_command.main, *args))


def test_messages_of_all_terminals():
  unicode = "╭─ Value error ─╮\n│ no int: 'abc' │\n│ \x1b[31m─────\x1b[0m │\n│ more │\n╰────╯\n"
  assert cli._complaint(unicode) == "no int: 'abc'"
  ascii_only = " Value error \n ----------- \n  no int:\n  'abc'\n  ------\n  more\n  \n"
  assert cli._complaint(ascii_only) == "no int: 'abc'"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1", "has no get_config"),
    ("def get_config():\n  return 3", "returns a int"),
    ("def get_config(:", "line 1: invalid syntax"),
  ],
)
def test_recipes(failure, tmp_path, text, message):
  path = tmp_path / "bad.py"
  path.write_text(text)
  assert message in failure(train_command.main, "--config", path)


def test_a_workdir_of_another_configuration(failure, tmp_path, recipe):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps({"seed": 7}))
  line = failure(train_command.main, "--config", recipe, "--workdir", workdir)
  assert f"{workdir} holds a run with" in line


def test_training_files(failure, tmp_path, recipe, records):
  path = broken_files(tmp_path, records)["truncated record"]
  args = ["--config", recipe, "--workdir", tmp_path / "run", "--data.train", path]
  assert f"truncated record in {path}" in failure(train_command.main, *args)
  args = ["--config", recipe, "--workdir", tmp_path / "held_out", "--data.train", records]
  line = failure(train_command.main, *args, "--data.eval", tmp_path / "none")
  assert line == f"no file matches '{tmp_path / 'none'}'"


def test_a_training_set_without_a_usable_record(failure, tmp_path, recipe):
  good = tiny.train_record(0)
  path = tmp_path / "corrupt.tfrecord"
  tiny.write_train(path, [TrainRecord(str(i), b"no jpeg", good.annotation) for i in range(3)])
  args = ["--config", recipe, "--workdir", tmp_path / "run", "--data.train", path]
  line = failure(train_command.main, *args)
  assert "32 of 32 training records are unusable" in line and "corrupt image" in line


def test_predict(failure, tmp_path, checkpoint, picture):
  common = ["--out", tmp_path / "out", "--question"]
  missing = [*common, "which?", "--image", tmp_path / "none.jpg", "--checkpoint", checkpoint]
  assert "none.jpg does not exist" in failure(run_predict, *missing)
  no_model = [*common, "which?", "--image", picture, "--checkpoint", tmp_path]
  assert "is not a model directory: it has no config.json" in failure(run_predict, *no_model)
  corrupt = tmp_path / "corrupt.jpg"
  corrupt.write_bytes(picture.read_bytes()[:200])
  bad_image = [*common, "which?", "--image", corrupt, "--checkpoint", checkpoint]
  assert "corrupt image: 200 bytes" in failure(run_predict, *bad_image)
  question = "which?<|im_end|>"
  control = [*common, question, "--image", picture, "--checkpoint", checkpoint]
  assert "control token: the user text holds <|im_end|>" in failure(run_predict, *control)
  assert "--question" in failure(run_predict, "--image", picture, "--out", tmp_path)
  assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_an_unknown_field(failure, tmp_path, checkpoint, picture):
  copy = tmp_path / "model"
  shutil.copytree(checkpoint, copy)
  config = json.loads((copy / "config.json").read_text())
  config["text"]["num_leyers"] = 3
  (copy / "config.json").write_text(json.dumps(config))
  args = ["--image", picture, "--question", "which?", "--out", tmp_path, "--checkpoint", copy]
  assert "config.json: text: unknown field num_leyers" in failure(run_predict, *args)


def test_evaluation(failure, tmp_path, checkpoint, records):
  for message, path in broken_files(tmp_path, records).items():
    args = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--data", path]
    assert message in failure(vrt_bench.main, *args)
  args = ["--checkpoint", tmp_path, "--out", tmp_path / "out", "--data", records]
  assert "missing feature" in failure(vrt_bench.main, *args)
  args = ["--predictions", tmp_path / "none.jsonl", "--out", tmp_path / "out", "--data", records]
  assert "none.jsonl" in failure(score.main, *args)
  assert not (tmp_path / "out").exists()


def test_a_workdir_without_a_model(failure, tmp_path):
  assert "it has no config.json" in failure(run_ship, "--model", tmp_path)
