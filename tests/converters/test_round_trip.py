"""from_hf and back: the same keys and the same bits, and the values where they belong."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from converters import from_hf, to_hf
from converters.params_reader import StoredParams
from converters.tensor_files import INDEX
from tests import tiny
from tests.converters.exports import write_export
from vrt_jax import model_directory
from vrt_jax.config import MeshConfig, ModelConfig
from vrt_jax.data.positions import mrope_position_ids
from vrt_jax.ops.attention_mask import AttentionMask

ROOT = Path(__file__).resolve().parents[2]
UNTIED = dataclasses.replace(
  tiny.MODEL, text=dataclasses.replace(tiny.MODEL.text, tie_embeddings=False)
)


def convert(src: Path, dst: Path, **options: object) -> Path:
  from_hf.convert(from_hf.Args(src=str(src), dst=dst, **options))
  return dst


def export(src: Path, dst: Path, **options: object) -> Path:
  to_hf.convert(to_hf.Args(src=str(src), dst=dst, **options))
  return dst


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
  """All tensors of a folder's safetensors files."""
  files = sorted(folder.glob("*.safetensors"))
  return {key: value for file in files for key, value in load_file(file).items()}


def assert_same_bits(ours: dict, theirs: dict) -> None:
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


@pytest.mark.parametrize("config", [tiny.MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_and_keys_survive(tmp_path, config, dtype):
  tensors = write_export(tmp_path / "src", config, dtype)
  model = convert(tmp_path / "src", tmp_path / "model")
  back = export(model, tmp_path / "back", max_shard_gb=1e-4)
  assert len(list(back.glob("*.safetensors"))) > 2
  assert_same_bits(read_folder(back), tensors)
  index = json.loads((back / INDEX).read_text())["weight_map"]
  assert index.keys() == tensors.keys()
  for name in set(index.values()):
    assert set(load_file(back / name)) == {key for key, file in index.items() if file == name}
  sums = [json.loads((f / "checksums.json").read_text()) for f in (model, back)]
  memory = {key for key in tensors if "mem" in key and "no_mem_embed" not in key}
  assert sums[0] == {key: value for key, value in sums[1].items() if key not in memory}


def test_another_dtype_rounds_and_stays_readable(tmp_path):
  tensors = write_export(tmp_path / "src")
  model = convert(tmp_path / "src", tmp_path / "model", dtype="bfloat16")
  assert {a.dtype.name for a in StoredParams(model / "params").arrays.values()} == {"bfloat16"}
  loaded = model_directory.load(str(model)).model
  assert loaded.config.compute_dtype == "bfloat16"
  assert {x.dtype.name for x in jax.tree.leaves(nnx.state(loaded))} == {"bfloat16"}
  exact = model_directory.load(str(model), "float32").model
  assert exact.config.compute_dtype == "float32"
  assert {x.dtype.name for x in jax.tree.leaves(nnx.state(exact))} == {"float32"}
  back = read_folder(export(model, tmp_path / "back"))
  key = "text_hidden_fcs.0.weight"
  assert torch.equal(back[key], tensors[key].bfloat16()) and back[key].dtype == torch.bfloat16


def test_pickles_give_the_same_model(tmp_path):
  tensors = write_export(tmp_path / "src", dtype=torch.bfloat16)
  for file in (tmp_path / "src").glob("model*"):
    file.unlink()
  torch.save(tensors, tmp_path / "src" / "pytorch_model.bin")
  model = convert(tmp_path / "src", tmp_path / "model")
  assert_same_bits(read_folder(export(model, tmp_path / "back")), tensors)


def test_a_second_copy_of_the_embedding_is_compared_and_comes_back(tmp_path):
  tensors = write_export(tmp_path / "src", num_shards=1)
  embedding = tensors["model.model.language_model.embed_tokens.weight"]
  tensors["model.lm_head.weight"] = embedding.clone()
  save_file(tensors, tmp_path / "src" / "model.safetensors")
  model = convert(tmp_path / "src", tmp_path / "model")
  assert not any("lm_head" in name for name in StoredParams(model / "params").arrays)
  assert_same_bits(read_folder(export(model, tmp_path / "back")), tensors)

  tensors["model.lm_head.weight"][3, 5] += 1
  save_file(tensors, tmp_path / "src" / "model.safetensors")
  with pytest.raises(ValueError, match=r"lm_head\.weight: tied to .* but the values differ"):
    convert(tmp_path / "src", tmp_path / "other")
  assert not list(tmp_path.glob("other*"))


def test_torch_is_not_imported_for_safetensors(tmp_path):
  write_export(tmp_path / "src")
  code = (
    "import sys; from pathlib import Path; from converters import from_hf, to_hf;"
    "from_hf.convert(from_hf.Args(src=sys.argv[1], dst=Path(sys.argv[2])));"
    "to_hf.convert(to_hf.Args(src=sys.argv[2], dst=Path(sys.argv[3])));"
    "sys.exit('torch' in sys.modules)"
  )
  paths = [str(tmp_path / name) for name in ("src", "model", "back")]
  done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, check=False)
  assert done.returncode == 0


def torch_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
  """Logits of the export's language model in transformers, by stripping the first prefix."""
  config = Qwen3VLConfig(**json.loads((folder / "config.json").read_text()))
  model = Qwen3VLForConditionalGeneration(config).eval()
  prefix = "model."
  state = {k.removeprefix(prefix): v for k, v in read_folder(folder).items() if k[:6] == prefix}
  if config.tie_word_embeddings:
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
  model.load_state_dict(state, strict=True)
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(ids).long()).logits.numpy()


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
  """Logits of a model directory for a text without pictures."""
  language = model_directory.load(str(folder)).model.qwen.language_model
  positions = np.stack([mrope_position_ids(row, [], -1, 2)[0] for row in ids], axis=1)
  ones = jnp.ones(ids.shape, jnp.int32)
  hidden, _ = language.hidden_states(
    language.embed(ids), positions, AttentionMask(ones, ones, jnp.arange(ids.shape[1]))
  )
  return np.asarray(language.logits(hidden))


@pytest.mark.parametrize("config", [tiny.MODEL, UNTIED], ids=["tied", "untied"])
def test_converted_model_has_the_logits_of_transformers(tmp_path, config):
  write_export(tmp_path / "src", config)
  ids = np.random.default_rng(1).integers(0, 500, (2, 9)).astype(np.int32)
  theirs = torch_logits(tmp_path / "src", ids)
  ours = our_logits(convert(tmp_path / "src", tmp_path / "model"), ids)
  assert theirs.std() > 0.1
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  exported = export(tmp_path / "model", tmp_path / "back")
  np.testing.assert_array_equal(torch_logits(exported, ids), theirs)


@pytest.mark.parametrize("config", [tiny.MODEL, UNTIED], ids=["tied", "untied"])
def test_the_language_half_loads_in_transformers(tmp_path, config):
  write_export(tmp_path / "src", config)
  model = convert(tmp_path / "src", tmp_path / "model")
  folder = export(model, tmp_path / "qwen", layout="qwen3_vl")
  theirs, info = Qwen3VLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  ids = np.random.default_rng(2).integers(0, 500, (1, 7)).astype(np.int32)
  with torch.no_grad():
    logits = theirs.eval()(input_ids=torch.from_numpy(ids).long()).logits.numpy()
  np.testing.assert_allclose(our_logits(model, ids), logits, atol=1e-4)


def test_chunks_follow_the_mesh_and_change_nothing(tmp_path):
  write_export(tmp_path / "src")
  plain = convert(tmp_path / "src", tmp_path / "plain")
  split = convert(tmp_path / "src", tmp_path / "split", mesh=MeshConfig(1, 2, 2))
  arrays = StoredParams(split / "params").arrays
  name = "qwen.language_model.layers.mlp.up_proj.weight"  # [layers, mlp, embed]
  layers, mlp, embed = arrays[name].shape
  chunks = json.loads(stored_metadata(split / "params", name))["chunks"]
  assert chunks == [1, mlp // 2, embed // 2] and layers == 2
  a, b = (nnx.state(model_directory.load(str(f)).model) for f in (plain, split))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def stored_metadata(folder: Path, name: str) -> bytes:
  """.zarray of a parameter."""
  import tensorstore as ts

  store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
  return ts.KvStore.open(store).result().read(".zarray").result().value


def test_a_trained_model_keeps_what_its_base_carried(tmp_path):
  tensors = write_export(tmp_path / "src")
  base = model_directory.load(str(convert(tmp_path / "src", tmp_path / "base")))
  path = tmp_path / "trained"
  model_directory.save(path, base.model, base.tokenizer, base.image, carried=base.carried)
  assert_same_bits(read_folder(export(path, tmp_path / "back")), tensors)


def test_config_of_the_way_back_keeps_foreign_fields(tmp_path):
  write_export(tmp_path / "src")
  file = tmp_path / "src" / "config.json"
  original = json.loads(file.read_text()) | {"custom": 7, "auto_map": {"AutoModel": "a.B"}}
  file.write_text(json.dumps(original))
  (tmp_path / "src" / "modeling_sa2va_qwen.py").write_text("raise SystemExit  # never run")
  back = export(convert(tmp_path / "src", tmp_path / "model"), tmp_path / "back")
  config = json.loads((back / "config.json").read_text())
  assert config["custom"] == 7 and config["auto_map"] == {"AutoModel": "a.B"}
  assert (back / "modeling_sa2va_qwen.py").is_file()
  assert model_config(tmp_path / "model") == tiny.MODEL


def model_config(folder: Path) -> ModelConfig:
  return model_directory.read_json(folder / "config.json", ModelConfig)
