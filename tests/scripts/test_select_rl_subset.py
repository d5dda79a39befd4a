"""The subset of prompts whose reward varies: choice, resuming, unusable records."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import select_rl_subset as subset
from tests import tiny
from tests.train import processes
from vrt_jax import cli, model_directory
from vrt_jax.config import GrpoConfig, MeshConfig
from vrt_jax.data.pipeline import subset_numbers
from vrt_jax.data.records import TrainRecord
from vrt_jax.data.sources import train_source

GRPO = GrpoConfig(
  group_size=3,
  max_new_tokens=8,
  max_masks=2,
  prompt_buckets=((256, 64),),
  extra_rewards=(("tests.rl.user_rewards:letters", 1.0),),
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Five usable records, one that is not, and a short last batch."""
  records = [tiny.train_record(i) for i in range(5)]
  records.insert(2, TrainRecord("bad", records[0].image[:200], records[0].annotation))
  return tiny.write_train(tmp_path_factory.mktemp("records") / "train.tfrecord", records)


def arguments(records: str, out: Path, **fields: object) -> subset.Args:
  values = {"top": 3, "batch_size": 4, "grpo": GRPO}
  return subset.Args(data=records, out=out, **(values | fields))


@pytest.fixture(scope="module")
def straight(records: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("straight") / "keys.json"
  subset.select(arguments(records, out), tiny.loaded())
  return out


def test_the_file_has_the_prompts_that_vary_most(records: str, straight: Path, tmp_path: Path):
  content = json.loads(straight.read_text())
  stds = [entry["std"] for entry in content["samples"].values()]
  assert len(stds) == 3
  assert stds == sorted(stds, reverse=True)
  for entry in content["samples"].values():
    assert len(entry["rewards"]) == 3
    assert entry["std"] == pytest.approx(np.std(entry["rewards"], ddof=1), abs=1e-5)
    assert entry["mean"] == pytest.approx(np.mean(entry["rewards"]), abs=1e-5)
  assert content["unusable"] == {"corrupt image": 1}
  assert content["settings"]["grpo"]["group_size"] == 3
  assert list(straight.parent.iterdir()) == [straight]
  everything = subset.select(arguments(records, tmp_path / "all.json", top=99), tiny.loaded())
  assert set(everything["samples"]) == {f"train_{i}" for i in range(5)}
  assert list(everything["samples"])[:3] == list(content["samples"])


def test_training_takes_the_file(records: str, straight: Path):
  chosen = json.loads(straight.read_text())["samples"]
  source = train_source(records)
  numbers = subset_numbers(str(straight), source)
  assert {source.keys()[n] for n in numbers} == set(chosen)


def test_an_interrupted_run_gives_the_same_file(
  records: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  out = tmp_path / "keys.json"
  whole = subset.batch_result

  def dies_in_the_second(source: object, start: int, *rest: object) -> dict:
    if start:
      raise KeyboardInterrupt
    return whole(source, start, *rest)

  monkeypatch.setattr(subset, "batch_result", dies_in_the_second)
  with pytest.raises(KeyboardInterrupt):
    subset.select(arguments(records, out), tiny.loaded())
  assert not out.exists()
  partial = tmp_path / "keys.json.partial.jsonl"
  assert len(partial.read_text().splitlines()) == 2
  partial.write_text(partial.read_text() + '{"samples": {"tra')  # killed while it wrote
  starts = []

  def counts(source: object, start: int, *rest: object) -> dict:
    starts.append(start)
    return whole(source, start, *rest)

  monkeypatch.setattr(subset, "batch_result", counts)
  subset.select(arguments(records, out), tiny.loaded())
  assert starts == [4]
  assert out.read_text() == straight.read_text()
  assert list(tmp_path.iterdir()) == [out]


def test_the_mesh_is_no_setting(records: str, tmp_path: Path):
  args = arguments(records, tmp_path / "keys.json")
  divided = dataclasses.replace(GRPO, rollout_tensor=2)
  elsewhere = dataclasses.replace(args, grpo=divided, mesh=MeshConfig(fsdp=8))
  assert subset.settings_of(elsewhere) == subset.settings_of(args)


def test_other_settings_do_not_go_on(records: str, tmp_path: Path):
  args = arguments(records, tmp_path / "keys.json")
  subset.Partial(tmp_path / "keys.json.partial.jsonl", subset.settings_of(args))
  with pytest.raises(ValueError, match="belongs to other settings"):
    subset.select(dataclasses.replace(args, seed=1), tiny.loaded())


def test_equal_variances_are_ordered_by_key():
  rewards = {"b": [0.0, 1.0], "c": [1.0, 2.0], "a": [2.0, 3.0], "d": [0.0, 2.0], "e": [1.0, 1.0]}
  assert list(subset.best_prompts(rewards, 3)) == ["d", "a", "b"]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"top": 0}, "top 0"),
    ({"grpo": dataclasses.replace(GRPO, group_size=1)}, "a variance needs 2"),
    ({"data": "none-*.tfrecord"}, "none-"),
    ({"mesh": MeshConfig(data=3)}, "does not fit"),
    ({"grpo": dataclasses.replace(GRPO, rollout_tensor=0)}, "grpo.rollout_tensor 0"),
    (
      {"grpo": dataclasses.replace(GRPO, prompt_buckets=((50, 64),))},
      "no record of .* can be used",
    ),
  ],
)
def test_mistakes_are_one_line(records: str, tmp_path: Path, fields: dict, message: str):
  args = dataclasses.replace(arguments(records, tmp_path / "keys.json"), **fields)
  with pytest.raises(ValueError, match=message):
    subset.select(args, tiny.loaded())


@pytest.mark.parametrize("mesh", ["", "--mesh.data 1 --mesh.tensor 2"])
def test_two_processes_give_the_same_file(mesh: str, records: str, straight: Path, tmp_path: Path):
  loaded = tiny.loaded()
  model_directory.save(tmp_path / "model", loaded.model, loaded.tokenizer, loaded.image)
  sizes = "--batch-size 4 --grpo.group-size 3 --grpo.max-new-tokens 8 --grpo.max-masks 2"
  rest = "--grpo.prompt-buckets 256 64 --grpo.extra-rewards tests.rl.user_rewards:letters 1.0"
  paths = ["--checkpoint", tmp_path / "model", "--data", records, "--out", tmp_path / "keys.json"]
  command = [sys.executable, "-m", "scripts.select_rl_subset", "--top", "3", *paths]
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  started = [
    subprocess.Popen(
      [*map(str, command), *sizes.split(), *rest.split(), *mesh.split()],
      cwd=processes.ROOT,
      env=processes.ENVIRONMENT
      | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  done = [processes.finish(process) for process in started]
  assert [status for status, _, _ in done] == [0, 0], done
  got, expected = (json.loads(p.read_text()) for p in (tmp_path / "keys.json", straight))
  assert got["samples"] == expected["samples"]
  assert got["unusable"] == expected["unusable"]
  assert "3 keys" in done[0][1] and "keys" not in done[1][1]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  monkeypatch.setattr(sys, "argv", ["select_rl_subset", "--help"])
  with pytest.raises(SystemExit) as stop:
    cli.run(subset.main)
  assert stop.value.code == 0
  assert "--grpo.group-size" in capsys.readouterr().out
