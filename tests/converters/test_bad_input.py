"""A conversion fails with one message that lists everything, and leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import from_hf, hub, layouts, streams, to_hf
from tests import tiny
from tests.converters.exports import random_tensors, write_config, write_export, write_sharded
from vrt_jax import cli, model_directory

SINGLE = "model.safetensors"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("export") / "src"
  write_export(folder, num_shards=1)
  return folder


@pytest.fixture
def src(good, tmp_path) -> Path:
  """An export that a test may damage."""
  return Path(shutil.copytree(good, tmp_path / "src"))


def failure(src: Path, **options: object) -> str:
  """The message of a conversion that must fail and leave nothing."""
  dst = src.parent / "model"
  before = sorted(p.name for p in src.parent.iterdir())
  with pytest.raises((ValueError, OSError)) as error:
    from_hf.convert(from_hf.Args(src=str(src), dst=dst, **options))
  assert sorted(p.name for p in src.parent.iterdir()) == before
  return str(error.value)


def change(src: Path, edit) -> None:
  """Rewrites the tensors of an export."""
  tensors = load_file(src / SINGLE)
  edit(tensors)
  save_file(tensors, src / SINGLE)


def test_all_problems_are_listed_at_once(src):
  def edit(tensors: dict) -> None:
    del tensors["text_hidden_fcs.0.bias"]
    del tensors["model.model.language_model.layers.1.mlp.up_proj.weight"]
    tensors["model.model.language_model.layers.7.mlp.up_proj.weight"] = torch.zeros(48, 32)
    tensors["stray.weight"] = torch.zeros(2)
    tensors["text_hidden_fcs.2.bias"] = torch.zeros(3)

  change(src, edit)
  message = failure(src)
  for part in (
    "5 problems: ",
    "text_hidden_fcs.0.bias: missing",
    "model.model.language_model.layers.1.mlp.up_proj.weight: missing",
    "model.model.language_model.layers.7.mlp.up_proj.weight: the model has 2 layers",
    "stray.weight: unknown key",
    "text_hidden_fcs.2.bias: shape [3], the model's is [32]",
  ):
    assert part in message
  assert "\n" not in message


def test_an_unused_dtype(src):
  change(src, lambda tensors: tensors.update({"text_hidden_fcs.0.bias": torch.zeros(32).long()}))
  assert "text_hidden_fcs.0.bias: dtype I64 is none of F32, F16, BF16" in failure(src)


def test_shards_and_index(tmp_path):
  src = tmp_path / "src"
  write_export(src, num_shards=3)
  names = sorted(p.name for p in src.glob("*.safetensors"))
  moved = load_file(src / names[1])
  key = next(iter(load_file(src / names[0])))
  save_file(moved | {key: torch.zeros(1), "extra": torch.zeros(1)}, src / names[1])
  (src / names[2]).unlink()
  message = failure(src)
  assert f"{names[2]}: no such shard" in message
  assert f"{key}: in {names[0]} and in {names[1]}" in message
  assert f"extra: in {names[1]}, not in the index" in message


def test_a_truncated_shard(src):
  file = src / SINGLE
  file.write_bytes(file.read_bytes()[:-100])
  assert f"{SINGLE}: damaged" in failure(src)
  file.write_bytes(b"")
  assert f"{SINGLE}: damaged" in failure(src)
  file.unlink()
  assert "holds no tensors" in failure(src)


def damaged_and_misnamed(src: Path) -> list[str]:
  """Truncates a shard and spoils the names and shapes of another; what a message must name."""
  index = json.loads((src / "model.safetensors.index.json").read_text())
  names = sorted(set(index["weight_map"].values()))
  file = src / names[2]
  file.write_bytes(file.read_bytes()[:-100])
  tensors = load_file(src / names[0])
  renamed, reshaped = [key for key, value in tensors.items() if value.ndim == 1][:2]
  tensors["stray.weight"] = tensors.pop(renamed)
  tensors[reshaped] = torch.zeros(1)
  save_file(tensors, src / names[0])
  return [
    f"{names[2]}: damaged",
    f"{renamed}: in the index, not in {names[0]}",
    f"stray.weight: in {names[0]}, not in the index",
    "stray.weight: unknown key",
    f"{renamed}: missing",
    f"{reshaped}: shape [1], the model's is",
  ]


def test_a_damaged_shard_and_wrong_names(tmp_path):
  """Tensors that the index has in the damaged shard are not called missing."""
  src = tmp_path / "src"
  write_export(src, num_shards=3)
  wanted = damaged_and_misnamed(src)
  message = failure(src)
  assert all(part in message for part in wanted)
  assert message.startswith(f"{len(wanted)} problems: ")


def test_a_damaged_shard_wrong_names_and_a_wrong_config(tmp_path):
  """Shapes and missing names need config.json; the others are listed."""
  src = tmp_path / "src"
  write_export(src, num_shards=3)
  wanted = [*damaged_and_misnamed(src)[:4], "hidden_act 'gelu' is not supported"]
  config = config_of(src)
  config["text_config"].update(hidden_act="gelu")
  (src / "config.json").write_text(json.dumps(config))
  message = failure(src)
  assert all(part in message for part in wanted)
  assert message.startswith(f"{len(wanted)} problems: ")


def config_of(src: Path) -> dict:
  return json.loads((src / "config.json").read_text())


@pytest.mark.parametrize(
  ("edit", "messages"),
  [
    (lambda c: c.update(model_type="llama"), ["model_type 'llama' is none of sa2va_chat"]),
    (
      lambda c: (c["text_config"].pop("hidden_size"), c["vision_config"].update(depth="four")),
      ["hidden_size is None, not a positive int", "depth is 'four', not a positive int"],
    ),
    (lambda c: c["text_config"].update(hidden_act="gelu"), ["hidden_act 'gelu' is not supported"]),
    (lambda c: c["text_config"].update(attention_bias=True), ["attention_bias True is not"]),
    (lambda c: c["text_config"].update(num_hidden_layers=3), ["layers.2.mlp.up_proj.weight: miss"]),
    (lambda c: c.pop("vision_config"), ["no vision_config"]),
    (lambda c: c["vrt_jax"].pop("sam2"), ["vrt_jax: no sam2"]),
    (lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[1, 1, 1]), ["mrope_section"]),
    (
      lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[6, 2]),
      ["mrope_section is [6, 2], not three integers"],
    ),
  ],
)
def test_a_wrong_config(src, edit, messages):
  config = config_of(src)
  edit(config)
  (src / "config.json").write_text(json.dumps(config))
  message = failure(src)
  assert all(part in message for part in messages)


def test_no_config_and_no_tokenizer(src):
  (src / "tokenizer.json").unlink()
  assert "tokenizer.json: no such file" in failure(src)
  (src / "config.json").write_text("{")
  assert "config.json is not JSON" in failure(src)
  (src / "config.json").unlink()
  assert "has no config.json" in failure(src)


def test_files_config_and_tokenizer_are_checked_together(src):
  file = src / SINGLE
  file.write_bytes(file.read_bytes()[:-100])
  config = config_of(src)
  config["text_config"].update(hidden_act="gelu", num_hidden_layers=0)
  (src / "config.json").write_text(json.dumps(config))
  (src / "tokenizer.json").write_text("{")
  message = failure(src)
  assert message.startswith("4 problems: ")
  for part in (f"{SINGLE}: damaged", "hidden_act", "num_hidden_layers is 0", "tokenizer.json: not"):
    assert part in message


def test_an_existing_destination_stays(src):
  dst = src.parent / "model"
  dst.mkdir()
  (dst / "mine").touch()
  assert "exists: delete it or choose another --dst" in failure(src)
  assert (dst / "mine").exists()


def test_no_space(src, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
  assert "no space: " in failure(src)


def test_a_disk_that_fills_up(src, monkeypatch):
  """The error of the write itself, half-way."""
  whole_read = streams.from_parts

  def full(source, parts, shape, checksums):
    array = whole_read(source, parts, shape, checksums)
    if parts[0].key != "text_hidden_fcs.0.weight":
      return array

    def read(start: int, stop: int):
      raise OSError(errno.ENOSPC, "No space left on device")

    return streams.StreamedArray(array.shape, array.dtype, array.rows, read)

  monkeypatch.setattr("converters.conversion.from_parts", full)
  assert "No space left on the disk of " in failure(src)


def test_an_interrupted_conversion_leaves_nothing(src, monkeypatch):
  def interrupt(*args: object) -> None:
    raise KeyboardInterrupt

  monkeypatch.setattr("converters.from_hf._verify", interrupt)
  with pytest.raises(KeyboardInterrupt):
    from_hf.convert(from_hf.Args(src=str(src), dst=src.parent / "model"))
  assert [p.name for p in src.parent.iterdir()] == ["src"]


def test_a_killed_conversion_does_not_load_and_can_be_repeated(src):
  dst = src.parent / "model"
  command = [sys.executable, "-c", KILLED, str(src), str(dst)]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "written\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  partial = dst.with_name("model.partial")
  assert (partial / "params").is_dir() and not dst.exists()
  with pytest.raises(ValueError, match=r"it has no config\.json"):
    model_directory.load(str(partial))
  from_hf.convert(from_hf.Args(src=str(src), dst=dst))
  assert not partial.exists()
  model_directory.load(str(dst))


KILLED = """
import sys, time
from pathlib import Path
from converters import from_hf
def stop(*args):
  print("written", flush=True)
  time.sleep(60)
from_hf._verify = stop
from_hf.convert(from_hf.Args(src=sys.argv[1], dst=Path(sys.argv[2])))
"""


def test_changed_values_are_noticed(src, tmp_path):
  """A folder that to_hf wrote has checksums; from_hf compares."""
  from_hf.convert(from_hf.Args(src=str(src), dst=tmp_path / "first"))
  back = tmp_path / "folder" / "back"
  to_hf.convert(to_hf.Args(src=str(tmp_path / "first"), dst=back))
  change(back, lambda tensors: tensors["text_hidden_fcs.0.bias"].add_(1))
  message = failure(back)
  assert message == "1 problem: text_hidden_fcs.0.bias: other values than checksums.json says"


def test_pickles_with_other_objects_are_not_loaded(tmp_path):
  file = tmp_path / "iter_1.pth"
  torch.save({"state_dict": {}, "meta": Evil()}, file)
  assert "holds Python objects that are not loaded for safety" in failure(file)
  assert not (tmp_path / "owned").exists()
  file.write_bytes(file.read_bytes()[:50])
  assert "iter_1.pth: damaged" in failure(file)


class Evil:
  def __reduce__(self):
    return (os.system, ("touch owned",))


def test_export_of_no_model(tmp_path):
  with pytest.raises(ValueError, match="is not a model directory"):
    to_hf.convert(to_hf.Args(src=str(tmp_path), dst=tmp_path / "back"))
  with pytest.raises(ValueError, match="the model has no adapters"):
    to_hf.convert(to_hf.Args(src="shapes", dst=tmp_path / "back", adapter=True))
  assert not (tmp_path / "back").exists()


def test_commands_print_one_line(monkeypatch, capsys, tmp_path):
  for module, args in ((from_hf, ["--src", "no/such"]), (to_hf, ["--src", "none"])):
    monkeypatch.setattr(hub, "_HUB_ID", hub.re.compile("never"))
    monkeypatch.setattr(sys, "argv", ["command", *args, "--dst", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
      cli.run(module.main)
    assert stop.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_hub_id_is_downloaded(monkeypatch, good, tmp_path):
  import huggingface_hub

  asked = []
  monkeypatch.setattr(
    huggingface_hub,
    "snapshot_download",
    lambda repo, revision, allow_patterns: asked.append((repo, revision, allow_patterns)) or good,
  )
  from_hf.convert(from_hf.Args(src="someone/model", dst=tmp_path / "m", revision="abc"))
  assert [call[:2] for call in asked] == [("someone/model", "abc")]
  assert "*.safetensors" in asked[0][2] and "*.bin" not in asked[0][2]
  assert (tmp_path / "m" / "config.json").is_file()


def test_an_interrupted_download_says_how_to_go_on(monkeypatch, tmp_path):
  import huggingface_hub
  from huggingface_hub.errors import HTTPError

  def cut_off(*_, **__):
    raise HTTPError("peer closed connection without sending complete message body")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", cut_off)
  args = from_hf.Args(src="someone/model", dst=tmp_path / "m")
  with pytest.raises(
    ValueError, match=r"someone/model .* peer closed .* run the same command again"
  ):
    from_hf.convert(args)
  assert not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
  config = layouts.replace(tiny.MODEL, text=layouts.replace(tiny.MODEL.text, vocab_size=300))
  write_config(tmp_path / "src", config)
  write_sharded(tmp_path / "src", random_tensors(config, torch.float32), 1)
  assert f"tokenizer has {tiny.tokenizer().vocab_size} tokens, the embedding 300" in failure(
    tmp_path / "src"
  )
