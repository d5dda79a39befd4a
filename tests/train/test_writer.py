"""metrics.jsonl: one object a line, continued without repeats."""

import json
import os
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vrt_jax.data.tfrecord import TFRecordSource
from vrt_jax.train.writer import MetricWriter, drop_lines_from


def steps(path: Path) -> list[int]:
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def board_events(workdir: Path) -> list[Event]:
  """Of the newest event file, without the version that it begins with."""
  newest = max((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
  return [Event.FromString(record) for record in TFRecordSource(newest)][1:]


def board_figures(workdir: Path) -> list[tuple[int, str, float]]:
  """(step, name, value) of the newest event file."""
  return [
    (event.step, value.tag, value.simple_value)
    for event in board_events(workdir)
    for value in event.summary.value
  ]


def test_lines_tensorboard_and_bar(tmp_path: Path, capsys: pytest.CaptureFixture):
  with MetricWriter(tmp_path, 0, 2) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1.5 / step, "grad_norm": 2.0})
      writer.advance()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert lines == [
    {"step": 1, "loss": 1.5, "grad_norm": 2.0},
    {"step": 2, "loss": 0.75, "grad_norm": 2.0},
  ]
  assert board_figures(tmp_path) == [
    (1, "loss", 1.5),
    (1, "grad_norm", 2.0),
    (2, "loss", 0.75),
    (2, "grad_norm", 2.0),
  ]
  assert "2/2" in capsys.readouterr().err


def test_a_line_is_on_the_disk_when_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  synced = []
  monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
  with MetricWriter(tmp_path, 0, 1) as writer:
    writer.write(1, {"loss": 1.5})
    assert (tmp_path / "metrics.jsonl").stat().st_size in synced


def test_a_resumed_run_writes_later_steps_again_once(tmp_path: Path):
  with MetricWriter(tmp_path, 0, 4) as writer:
    for step in (1, 2, 3):
      writer.write(step, {"loss": 1.0})
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 4, "lo')  # killed while it wrote
  with MetricWriter(tmp_path, 2, 4) as writer:
    for step in (3, 4):
      writer.write(step, {"loss": 2.0})
  assert steps(path) == [1, 2, 3, 4]
  start = board_events(tmp_path)[0]  # TensorBoard hides what older files have from this step on
  assert (start.step, start.session_log.status) == (2, SessionLog.START)


def test_drop_lines_of_a_missing_file_makes_none(tmp_path: Path):
  drop_lines_from(tmp_path / "metrics.jsonl", 3)
  assert not list(tmp_path.iterdir())


def test_figures_that_are_not_finite_are_null(tmp_path: Path):
  with MetricWriter(tmp_path, 0, 1) as writer:
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 3.0})
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert line == {"step": 1, "loss": None, "grad_norm": None, "tokens": 3.0}
  assert board_figures(tmp_path) == [(1, "tokens", 3.0)]
