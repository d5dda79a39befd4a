"""Every command with inputs that are not there, options of a wrong type, and extras left out."""

import runpy
import sys

import pytest

from tests.test_commands import MODULES

ABSENT = "absent/of/here"
LINES = {
  "converters.from_hf": [f"--src {ABSENT}.pth --dst OUT"],
  "converters.to_hf": [f"--src {ABSENT} --dst OUT"],
  "eval.api_baseline": [
    f"--base-url http://127.0.0.1:9 --model m --box-format yxyx_1000 --data {ABSENT} --out OUT"
  ],
  "eval.merge": [f"--results {ABSENT} --data {ABSENT} --out OUT"],
  "eval.refcoco": [f"--refs {ABSENT} --instances {ABSENT} --images {ABSENT} --out OUT"],
  "eval.score": [f"--predictions {ABSENT} --data {ABSENT} --out OUT"],
  "eval.vrt_bench": [
    f"--checkpoint {ABSENT} --data {ABSENT} --out OUT",
    f"--checkpoint shapes --data {ABSENT} --out OUT",
  ],
  "scripts.aot": [f"--config {ABSENT} --topology v5e:4x4"],
  "scripts.bench": [f"data_pipeline --data {ABSENT}", f"data_pipeline --tokenizer {ABSENT}"],
  "scripts.bench_conversion": [f"--tokenizer {ABSENT} --out OUT"],
  "scripts.export_data": [f"--data {ABSENT} --out OUT"],
  "scripts.import_data": [
    f"--format coco --questions {ABSENT} --images . --annotations {ABSENT} --out OUT",
    f"--format masks --questions {ABSENT} --images . --annotations {ABSENT} --out OUT",
  ],
  "scripts.inspect_data": [f"--data {ABSENT}", f"--data {ABSENT} --verify"],
  "scripts.parity": [f"--src {ABSENT} --image {ABSENT} --question q"],
  "scripts.prepare_data": [f"--src {ABSENT} --out OUT"],
  "scripts.pretrain_grounding": [f"--base {ABSENT} --data {ABSENT} --out OUT"],
  "scripts.pretrain_language": [f"--base {ABSENT} --data {ABSENT} --out OUT"],
  "scripts.pretrain_perception": [f"--data {ABSENT} --out OUT"],
  "scripts.rl_table": [f"--sft {ABSENT} --rl {ABSENT} --out OUT"],
  "scripts.select_rl_subset": [
    f"--checkpoint {ABSENT} --data {ABSENT} --out OUT --top 2",
    f"--checkpoint shapes --data {ABSENT} --out OUT --top 2",
  ],
  "scripts.ship_model": [f"--model {ABSENT} --name test_of_a_missing_model"],
  "scripts.time_program": [f"--config {ABSENT}"],
  "vrt_jax.predict": [
    f"--image {ABSENT} --question q --out OUT",
    f"--requests {ABSENT} --out OUT",
    f"--checkpoint {ABSENT} --image docs/shapes.png --question q --out OUT",
  ],
  "vrt_jax.train": [
    f"--data.train {ABSENT} --workdir OUT",
    f"--config {ABSENT}.py --workdir OUT",
    f"--base {ABSENT} --workdir OUT",
  ],
}
NO_INPUT = {"scripts.aot_table", "scripts.growth", "scripts.make_shapes"}
"""Commands that read no file."""


def complaint(module: str, words: list[str], monkeypatch, capsys) -> str:
  """What a command prints as it ends with exit status 1."""
  monkeypatch.setattr(sys, "argv", [f"{module}.py", *words])
  with pytest.raises(SystemExit) as stop:
    runpy.run_module(module, run_name="__main__")
  printed = capsys.readouterr().err
  assert stop.value.code == 1, printed
  return printed


def test_every_command_is_here():
  assert set(MODULES) == {*LINES, *NO_INPUT}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
  ("module", "line"), [(module, line) for module, lines in LINES.items() for line in lines]
)
def test_a_missing_input_is_named(module, line, tmp_path, monkeypatch, capsys):
  words = line.replace("OUT", str(tmp_path / "out")).split()
  last = complaint(module, words, monkeypatch, capsys).splitlines()[-1]
  assert last.startswith("error: ") and ABSENT in last
  assert not (tmp_path / "out/model").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", sorted({*LINES, *NO_INPUT} - {"scripts.bench"}))
def test_an_unknown_option_is_named(module, monkeypatch, capsys):
  line = next(iter(LINES.get(module, ["--out OUT"])))
  words = [*line.split(), "--no-such-option", "1"]
  (shown,) = complaint(module, words, monkeypatch, capsys).splitlines()
  assert shown.startswith("error: ") and "--no-such-option" in shown


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
  ("absent", "module", "line", "extra"),
  [
    ("torch", "converters.from_hf", "--src FILE.pth --dst FILE", "[torch]"),
    ("torch", "scripts.bench", "prefill", "[torch]"),
    ("libtpu", "scripts.aot", "--config configs/photos_smoke.py --topology v5e:4x4", "[aot]"),
  ],
)
def test_a_missing_extra_is_named(absent, module, line, extra, tmp_path, monkeypatch, capsys):
  (tmp_path / "file.pth").touch()
  words = line.replace("FILE", str(tmp_path / "file")).split()
  for name in [n for n in sys.modules if n.startswith("converters.torch")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, absent, None)
  (shown,) = complaint(module, words, monkeypatch, capsys).splitlines()
  assert shown.startswith(f"error: {absent} is not installed") and extra in shown
