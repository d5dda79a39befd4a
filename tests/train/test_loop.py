"""The whole loop on a tiny model: files of a workdir, resume after a kill, mesh equality."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vrt_jax import model_directory
from vrt_jax.config import TrainConfig
from vrt_jax.data.records import TFRecordWriter, serialize_eval
from vrt_jax.files import sole_writer
from vrt_jax.runtime import make_mesh
from vrt_jax.train import loop
from vrt_jax.train.step_clock import CompiledOnce


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
  folder = tmp_path_factory.mktemp("records")
  train = tiny.write_train(folder / "train.tfrecord", [tiny.train_record(i) for i in range(6)])
  with TFRecordWriter(folder / "eval.tfrecord") as writer:
    for i in range(2):
      writer.write(serialize_eval(tiny.eval_record(i)))
  data = dataclasses.replace(
    tiny.train_config().data, train=train, eval=str(folder / "eval.tfrecord")
  )
  optim = dataclasses.replace(tiny.train_config().optim, steps=5)
  evaluation = dataclasses.replace(tiny.EVAL, prompt_buckets=((256, 64),))
  return tiny.train_config(
    data=data, optim=optim, eval=evaluation, evaluate_base=True, log_every=1, checkpoint_every=2
  )


def logged(workdir: Path) -> list[dict]:
  """metrics.jsonl without the times."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timings = {"step_seconds", "tokens_per_second", "compiles"}
  return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def test_a_workdir_has_one_run_at_a_time(config: TrainConfig, tmp_path: Path):
  with sole_writer(tmp_path / "run"):
    with pytest.raises(ValueError, match="another process writes to"):
      loop.train(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_killed_run_goes_on_bit_for_bit(
  config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
  results = loop.train(config, tmp_path / "straight")
  assert set(results["metrics"]) >= {"reasoning_lq", "reasoning_sq", "answer_miou"}
  assert [line["step"] for line in logged(tmp_path / "straight")] == [1, 2, 3, 4, 5]
  compiles = [
    json.loads(line)["compiles"]
    for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
  ]
  assert compiles == [1] * 5
  for part in ("config.json", "model/config.json", "checkpoints/5", "eval/base", "eval/final"):
    assert (tmp_path / "straight" / part).exists()

  whole_call = CompiledOnce.__call__

  def dies_at_step_4(self, state, *args):
    if int(state.step) == 3:
      raise KeyboardInterrupt
    return whole_call(self, state, *args)

  killed = tmp_path / "killed"
  monkeypatch.setattr(CompiledOnce, "__call__", dies_at_step_4)
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, killed)
  monkeypatch.setattr(CompiledOnce, "__call__", whole_call)
  assert not (killed / "model").exists()
  capsys.readouterr()
  loop.train(config, killed)
  assert "resumed from step 2" in capsys.readouterr().out
  assert logged(killed) == logged(tmp_path / "straight")
  states = [
    jax.tree.leaves(model_directory.load(str(w / "model")).model.qwen.language_model.layers)
    for w in (killed, tmp_path / "straight")
  ]
  for a, b in zip(*states, strict=True):
    np.testing.assert_array_equal(a, b)


def test_mistakes_leave_no_workdir(config: TrainConfig, tmp_path: Path):
  missing = dataclasses.replace(config.data, train=str(tmp_path / "none-*"))
  with pytest.raises(ValueError, match="none-"):
    loop.train(dataclasses.replace(config, data=missing), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_mesh_that_does_not_fit(config: TrainConfig):
  with pytest.raises(ValueError, match=r"mesh \(3, 1, 1\) .* does not fit"):
    make_mesh(dataclasses.replace(config.mesh, data=3))
