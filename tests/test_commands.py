"""The installed commands."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from vrt_jax import __version__

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
COMMANDS = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"]


def test_the_commands_are_those_of_the_readme():
  assert set(COMMANDS) == {"vrt-train", "vrt-predict", "vrt-eval", "vrt-convert"}


@pytest.mark.parametrize("target", COMMANDS.values(), ids=COMMANDS)
def test_a_command_has_help_a_version_and_one_line_for_errors(target, monkeypatch, capsys):
  module, _, name = target.partition(":")
  command = getattr(import_module(module), name)
  for option, shown in (("--version", __version__), ("--help", "usage")):
    monkeypatch.setattr(sys, "argv", ["command", option])
    with pytest.raises(SystemExit) as stop:
      command()
    assert not stop.value.code
    assert shown in capsys.readouterr().out
  monkeypatch.setattr(sys, "argv", ["command", "--no-such-option"])
  with pytest.raises(SystemExit) as stop:
    command()
  assert stop.value.code == 1
  assert capsys.readouterr().err.startswith("error: ")
