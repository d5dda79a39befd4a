"""Model directories: exact round trip, LoRA merged, and nothing half-written or foreign loads."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests import tiny
from tests.train import processes
from vrt_jax import model_directory
from vrt_jax.models.lora import merge_lora
from vrt_jax.models.sa2va import Sa2VA


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("models") / "model"
  loaded = tiny.loaded()
  model_directory.save(path, loaded.model, loaded.tokenizer, loaded.image)
  return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
  """A model directory that a test may damage."""
  return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(first: Sa2VA, second: Sa2VA) -> None:
  a, b = (dict(nnx.to_flat_state(nnx.state(m))) for m in (first, second))
  assert a.keys() == b.keys()
  for path, variable in a.items():
    assert variable.get_value().dtype == b[path].get_value().dtype
    np.testing.assert_array_equal(variable.get_value(), b[path].get_value())
    assert type(variable) is type(b[path])


def test_round_trip_is_bit_exact(saved: Path):
  got, given = model_directory.load(str(saved)), tiny.loaded()
  assert_same(got.model, given.model)
  assert got.model.config == given.model.config
  assert got.image == given.image
  text = "<think>a (<ver><obj1> [SEG]</ver>)</think>"
  assert got.tokenizer.encode(text) == given.tokenizer.encode(text)
  assert got.tokenizer.vocab_size == given.tokenizer.vocab_size
  assert {p.name for p in saved.iterdir()} == {
    *("config.json", "processor.json", "tokenizer", "params"),
  }
  assert not saved.with_name("model.partial").exists()


def test_adapters_are_merged(tmp_path: Path):
  model = tiny.random_model(dataclasses.replace(tiny.MODEL, lora=tiny.LORA), seed=1)
  model_directory.save(tmp_path / "m", model, tiny.tokenizer(), tiny.IMAGE)
  got = model_directory.load(str(tmp_path / "m")).model
  assert got.config == tiny.MODEL
  assert_same(got, merge_lora(model))


def test_bfloat16_files_load_as_float32(tmp_path: Path):
  model_directory.save(
    tmp_path / "m", tiny.loaded().model, tiny.tokenizer(), tiny.IMAGE, dtype="bfloat16"
  )
  got = nnx.state(model_directory.load(str(tmp_path / "m")).model)
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(tiny.loaded().model)
  )
  jax.tree.map(np.testing.assert_array_equal, got, rounded)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}


def test_saving_again_replaces_the_directory(copy: Path):
  model = tiny.random_model(seed=2)
  (copy / "stray.txt").write_text("old")
  model_directory.save(copy, model, tiny.tokenizer(), tiny.IMAGE)
  assert not (copy / "stray.txt").exists()
  assert_same(model_directory.load(str(copy)).model, model)


def test_a_save_that_breaks_off_leaves_the_old_model_and_never_loads(
  copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  def fail(*args: object) -> None:
    raise OSError("disk full")

  monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
  for target in (copy, tmp_path / "new"):
    with pytest.raises(OSError, match="disk full"):
      model_directory.save(target, tiny.random_model(seed=2), tiny.tokenizer(), tiny.IMAGE)
  assert_same(model_directory.load(str(copy)).model, tiny.loaded().model)
  for name in ("new", "new.partial", "copy.partial"):
    with pytest.raises(ValueError, match="is not a model directory: it has no"):
      model_directory.load(str(tmp_path / name))
  monkeypatch.undo()
  model_directory.save(tmp_path / "new", tiny.loaded().model, tiny.tokenizer(), tiny.IMAGE)
  assert not (tmp_path / "new.partial").exists()
  assert_same(model_directory.load(str(tmp_path / "new")).model, tiny.loaded().model)


@pytest.mark.parametrize(
  "part", ["config.json", "processor.json", "tokenizer/tokenizer.json", "params"]
)
def test_a_missing_part_is_named(copy: Path, part: str):
  target = copy / part
  shutil.rmtree(target) if target.is_dir() else target.unlink()
  with pytest.raises(ValueError, match=f"copy is not a model directory: it has no {part}$"):
    model_directory.load(str(copy))


def edit(file: Path, **changes: object) -> None:
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_unknown_fields_are_named(copy: Path):
  edit(copy / "config.json", colour="red")
  with pytest.raises(ValueError, match=r"config.json: unknown field colour; ModelConfig has"):
    model_directory.load(str(copy))
  shutil.copy(copy / "processor.json", copy / "config.json")
  with pytest.raises(ValueError, match=r"config.json: unknown field"):
    model_directory.load(str(copy))


def test_unknown_fields_of_a_part_are_named(copy: Path):
  text = json.loads((copy / "config.json").read_text())["text"]
  edit(copy / "config.json", text=text | {"num_experts": 8})
  with pytest.raises(ValueError, match=r"config.json: text: unknown field num_experts"):
    model_directory.load(str(copy))


@pytest.mark.parametrize("change", [{"vocab_size": 600}, {"tie_embeddings": False}])
def test_parameters_of_another_model_raise(copy: Path, change: dict):
  text = json.loads((copy / "config.json").read_text())["text"]
  edit(copy / "config.json", text=text | change)
  with pytest.raises(ValueError):
    model_directory.load(str(copy))


def test_no_device_of_a_mesh_holds_more_than_its_part(tmp_path: Path):
  by_mesh = processes.found_by("tests.loaded_on_mesh", tmp_path / "found.json")
  assert set(by_mesh) == {"1x4x1", "2x2x1", "1x2x2"}
  for found in by_mesh.values():
    whole, *others = found["alone"]
    assert others == [0, 0, 0] and found["part"] < 0.7 * whole
    assert found["read"] == [found["part"]] * 4
    assert len(set(found["with_state"])) == 1  # nothing is left on the device that computed it
    assert found["same"]


def test_each_of_two_processes_holds_its_part(saved: Path, tmp_path: Path):
  files = [tmp_path / f"{number}.json" for number in range(2)]
  started = [
    processes.start_module("tests.loaded_by_two", str(saved), str(file), variables=variables)
    for file, variables in zip(files, processes.rendezvous(2), strict=True)
  ]
  done = [processes.finish(process) for process in started]
  assert [status for status, _, _ in done] == [0, 0], done
  total = sum(x.nbytes for x in jax.tree.leaves(nnx.state(tiny.loaded().model)))
  for file in files:
    found = json.loads(file.read_text())
    assert found["same"] and len(found["bytes"]) == 2
    assert max(found["bytes"]) < total / 2


@pytest.mark.parametrize("change", [{"vocab_size": 600}, {"tie_embeddings": False}])
def test_parameters_of_another_model_raise_on_a_mesh_too(copy: Path, change: dict):
  text = json.loads((copy / "config.json").read_text())["text"]
  edit(copy / "config.json", text=text | change)
  mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))
  with pytest.raises(ValueError, match="params does not fit the sizes"):
    model_directory.load(str(copy), mesh=mesh)


WRITE_ON_TWO_DEVICES = """
import sys
from pathlib import Path
import jax
from flax import nnx
from tests import tiny
from vrt_jax import model_directory
from vrt_jax.config import MeshConfig
from vrt_jax.placement import param_shardings
from vrt_jax.runtime import make_mesh
assert jax.device_count() == 2
graphdef, state = nnx.split(tiny.random_model())
state = jax.device_put(state, param_shardings(state, make_mesh(MeshConfig())))
model = nnx.merge(graphdef, state)
model_directory.save(Path(sys.argv[1]), model, tiny.tokenizer(), tiny.IMAGE)
"""


def test_a_directory_loads_on_other_devices_than_wrote_it(tmp_path: Path):
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  folder = tmp_path / "model"
  command = [sys.executable, "-c", WRITE_ON_TWO_DEVICES, str(folder)]
  subprocess.run(command, check=True, env=env, cwd=Path(__file__).resolve().parents[1])
  loaded = model_directory.load(str(folder)).model
  jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(tiny.random_model()))
