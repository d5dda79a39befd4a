"""Plain Qwen3-VL checkpoints: heads are new, tokens are added, embeddings fit the tokenizer."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from converters import from_hf, to_hf
from converters.hf_config import hf_config, qwen_config
from tests import tiny
from tests.converters.exports import random_tensors, write_config
from tests.parity.sam2_weights import load_torch, random_torch_model
from vrt_jax import model_directory
from vrt_jax.data.chat import VRT_TOKENS, ChatTokenizer
from vrt_jax.sizes import SAM2_SIZES

PADDED = tiny.VOCAB_SIZE + 40


def write_qwen(folder: Path, vocab_size: int, tied: bool = True) -> dict[str, torch.Tensor]:
  """A checkpoint as Qwen publishes it: no Sa2VA tokens, padded embeddings."""
  text = dataclasses.replace(tiny.MODEL.text, vocab_size=vocab_size, tie_embeddings=tied)
  config = dataclasses.replace(tiny.MODEL, text=text)
  write_config(folder, config)
  content = hf_config(config, tiny.tokenizer(), "float32", {})
  architectures = ["Qwen3VLForConditionalGeneration"]
  content |= {"model_type": "qwen3_vl", "architectures": architectures}
  (folder / "config.json").write_text(json.dumps(content))
  without_added_tokens(folder)
  every = random_tensors(config, torch.float32)
  tensors = {k.removeprefix("model."): v for k, v in every.items() if k.startswith("model.")}
  save_file(tensors, folder / "model.safetensors")
  return tensors


def without_added_tokens(folder: Path) -> None:
  """The tokenizer before Sa2VA's five tokens."""
  file = folder / "tokenizer.json"
  content = json.loads(file.read_text())
  content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in VRT_TOKENS]
  file.write_text(json.dumps(content))
  (folder / "tokenizer_config.json").unlink()
  assert Tokenizer.from_file(str(file)).token_to_id("[SEG]") is None


@pytest.mark.parametrize("tied", [True, False])
def test_padded_embeddings_are_cut_to_the_tokenizer(tmp_path, monkeypatch, tied):
  monkeypatch.setitem(SAM2_SIZES, "large", tiny.MODEL.sam2)  # a small stand-in
  tensors = write_qwen(tmp_path / "src", PADDED, tied)
  from_hf.convert(from_hf.Args(src=str(tmp_path / "src"), dst=tmp_path / "model", seed=3))
  loaded = model_directory.load(str(tmp_path / "model"))
  assert loaded.tokenizer.vocab_size == tiny.tokenizer().vocab_size
  assert loaded.tokenizer.seg_id == tiny.tokenizer().seg_id
  language = loaded.model.qwen.language_model
  rows = loaded.tokenizer.vocab_size
  embedding = tensors["model.language_model.embed_tokens.weight"][:rows].numpy()
  np.testing.assert_array_equal(language.embed_tokens.weight[...], embedding)
  if not tied:
    np.testing.assert_array_equal(language.lm_head.weight[...], tensors["lm_head.weight"][:rows])
  assert loaded.model.config.sam2 == tiny.MODEL.sam2
  assert loaded.image.max_pixels == 2048 * 28 * 28 and loaded.image.inference_factor_px == 28


def test_missing_rows_are_the_mean(tmp_path):
  rows = tiny.tokenizer().vocab_size
  tensors = write_qwen(tmp_path / "src", rows - len(VRT_TOKENS))
  save_sam2(tmp_path / "sam2")
  args = from_hf.Args(
    src=str(tmp_path / "src"), dst=tmp_path / "model", sam2=str(tmp_path / "sam2")
  )
  from_hf.convert(args)
  model = model_directory.load(str(tmp_path / "model")).model
  embedding = tensors["model.language_model.embed_tokens.weight"].numpy()
  found = np.asarray(model.qwen.language_model.embed_tokens.weight[...])
  np.testing.assert_array_equal(found[: len(embedding)], embedding)
  mean = np.broadcast_to(embedding.mean(axis=0), found[len(embedding) :].shape)
  np.testing.assert_allclose(found[len(embedding) :], mean, rtol=1e-6, atol=1e-7)


def save_sam2(folder: Path) -> dict[str, torch.Tensor]:
  model = random_torch_model(tiny.MODEL.sam2)
  model.save_pretrained(folder)
  return model.state_dict()


def test_with_a_sam2_checkpoint(tmp_path):
  write_qwen(tmp_path / "src", PADDED)
  state = save_sam2(tmp_path / "sam2")
  report = from_hf.convert(
    from_hf.Args(src=str(tmp_path / "src"), dst=tmp_path / "model", sam2=str(tmp_path / "sam2"))
  )
  assert report["notes"] == [
    f"embeddings: {PADDED} rows in the checkpoint, {tiny.tokenizer().vocab_size} for the tokenizer",
    "text_hidden_fcs is untrained",
  ]
  ours = model_directory.load(str(tmp_path / "model")).model.sam2
  theirs = load_torch(tiny.MODEL.sam2, state)
  np.testing.assert_array_equal(
    ours.mask_decoder.conv_s0.weight[...], theirs.mask_decoder.conv_s0.weight[...]
  )


def test_a_language_model_in_the_place_of_sam2(tmp_path):
  write_qwen(tmp_path / "src", PADDED)
  src = str(tmp_path / "src")
  with pytest.raises(ValueError, match=r"src is no checkpoint of SAM 2 alone"):
    from_hf.convert(from_hf.Args(src=src, dst=tmp_path / "model", sam2=src))


def test_an_untied_config_needs_an_output_embedding(tmp_path):
  write_qwen(tmp_path / "src", PADDED)
  file = tmp_path / "src" / "config.json"
  config = json.loads(file.read_text())
  config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
  file.write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"no lm_head\.weight, and config\.json does not tie it"):
    from_hf.convert(from_hf.Args(src=str(tmp_path / "src"), dst=tmp_path / "model"))


def test_fields_that_published_configs_leave_out():
  text = dataclasses.replace(
    tiny.MODEL.text, num_heads=2, hidden_size=256, head_dim=128, mrope_section=(24, 20, 20)
  )
  config = dataclasses.replace(tiny.MODEL, text=text)
  content = hf_config(config, tiny.tokenizer(), "float32", {})
  del content["text_config"]["head_dim"]
  del content["text_config"]["rope_scaling"]["mrope_section"]
  assert qwen_config(content)[1] == text


def test_the_real_tokenizer(tmp_path, shared_data):
  """151669 entries and the five tokens: 151674 rows."""
  tokenizer = ChatTokenizer.from_dir(shared_data / "qwen3-tokenizer")
  assert tokenizer.vocab_size == 151674 and tokenizer.seg_id == 151669


def test_the_export_of_a_new_model_names_the_reference_code(tmp_path):
  write_qwen(tmp_path / "src", PADDED)
  save_sam2(tmp_path / "sam2")
  args = from_hf.Args(
    src=str(tmp_path / "src"), dst=tmp_path / "model", sam2=str(tmp_path / "sam2")
  )
  from_hf.convert(args)
  to_hf.convert(to_hf.Args(src=str(tmp_path / "model"), dst=tmp_path / "hf"))
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert config["model_type"] == "sa2va_chat"
  assert config["auto_map"]["AutoModel"].endswith("--modeling_sa2va_qwen.Sa2VAChatModelQwen")
  assert config["text_config"]["vocab_size"] == tiny.tokenizer().vocab_size
  keys = load_file(tmp_path / "hf" / "model.safetensors").keys()
  assert "text_hidden_fcs.2.weight" in keys and "model.model.visual.pos_embed.weight" in keys
  names = {path.name for path in (tmp_path / "hf").iterdir()}
  assert names >= {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "checksums.json",
  }
