"""The commands: help with examples, versions, errors and shell completion."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from vrt_jax import __version__, cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
  for room in ("vrt_jax", "scripts", "eval", "converters")
  for path in (ROOT / room).rglob("*.py")
  if "cli.run(" in path.read_text() and path.name != "cli.py"
)


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


def test_the_modules_with_a_command_are_found():
  assert {"vrt_jax.train", "vrt_jax.predict", "eval.score", "scripts.aot"} <= set(MODULES)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", MODULES)
def test_help_shows_an_example_and_the_options(module, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [f"{module}.py", "--help"])
  with pytest.raises(SystemExit) as stop:
    runpy.run_module(module, run_name="__main__")
  shown = capsys.readouterr().out
  assert not stop.value.code
  assert re.search(rf"^ *python -m {re.escape(module)} \S", shown, re.MULTILINE)
  assert "--help" in shown.partition("usage: ")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_completes_the_options_of_a_command(command, tmp_path, monkeypatch, capsys):
  module, _, name = COMMANDS[command].partition(":")
  monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{command}", "--tyro-print-completion", "bash"])
  with pytest.raises(SystemExit) as stop:
    getattr(import_module(module), name)()
  assert not stop.value.code
  script = tmp_path / "completion"
  script.write_text(capsys.readouterr().out)
  asked = f"source {script} && complete -p {command}"
  done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip().endswith(command)
  assert "--help" in script.read_text()


def test_ctrl_c_is_one_line_and_a_status_of_its_own(capsys):
  def interrupted() -> None:
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as stop:
    cli.run(interrupted)
  assert stop.value.code == 130
  assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_platform_that_is_not_there_is_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "vrt_jax.train", "--workdir", str(tmp_path / "run")],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "rocm"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith('error: no device for JAX_PLATFORMS="rocm"')
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, ModuleNotFoundError, KeyError])
def test_other_failures_keep_their_traceback(kind):
  def failed() -> None:
    raise kind("a mistake of ours")

  with pytest.raises(kind, match="a mistake of ours"):
    cli.run(failed)


@pytest.mark.parametrize(
  ("words", "own", "fields"),
  [
    ([], [], []),
    (["--batch", "4"], ["--batch", "4"], []),
    (["--batch", "4", "--", "--optim.remat", "--"], ["--batch", "4"], ["--optim.remat", "--"]),
  ],
)
def test_fields_of_a_recipe_follow_two_dashes(words, own, fields):
  assert cli.split_at_dashes(words) == (own, fields)
