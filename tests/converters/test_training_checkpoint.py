"""The reference's .pth files on top of a base model, and adapters on the way out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters import from_hf, to_hf
from converters.training_checkpoint import export_names
from tests import tiny
from vrt_jax import model_directory
from vrt_jax.config import LoraConfig
from vrt_jax.models.lora import merge_lora
from vrt_jax.train import loop

RANK, ALPHA = 3, 12.0
LAYER = "mllm.model.base_model.model.model.language_model.layers"
UNTIED = dataclasses.replace(
  tiny.MODEL, text=dataclasses.replace(tiny.MODEL.text, tie_embeddings=False)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("base") / "model"
  model_directory.save(path, tiny.random_model(UNTIED), tiny.tokenizer(), tiny.IMAGE)
  return path


def lora_tensors() -> dict[str, torch.Tensor]:
  """Adapters on all seven linear layers, as xtuner saves them."""
  generator = torch.Generator().manual_seed(0)
  text = UNTIED.text
  d, f = text.hidden_size, text.intermediate_size
  q, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
  sizes = {
    "self_attn.q_proj": (d, q),
    "self_attn.k_proj": (d, kv),
    "self_attn.v_proj": (d, kv),
    "self_attn.o_proj": (q, d),
    "mlp.gate_proj": (d, f),
    "mlp.up_proj": (d, f),
    "mlp.down_proj": (f, d),
  }
  tensors = {}
  for layer in range(text.num_layers):
    for name, (inner, outer) in sizes.items():
      prefix = f"{LAYER}.{layer}.{name}"
      a, b = (RANK, inner), (outer, RANK)
      tensors[f"{prefix}.lora_A.default.weight"] = torch.randn(a, generator=generator)
      tensors[f"{prefix}.lora_B.default.weight"] = torch.randn(b, generator=generator)
  return tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
  """What the SFT recipe saves: adapters, trained embeddings, mask decoder, text_hidden_fcs."""
  rows, d = UNTIED.text.vocab_size, UNTIED.text.hidden_size
  tensors = lora_tensors()
  head = "mllm.model.base_model.model.lm_head"
  tensors[f"{head}.modules_to_save.default.weight"] = torch.randn(rows, d)
  tensors[f"{head}.original_module.weight"] = torch.randn(rows, d)
  tensors["text_hidden_fcs.2.bias"] = torch.randn(UNTIED.sam2.d_model)
  decoder = "grounding_encoder.sam2_model.sam_mask_decoder"
  tensors[f"{decoder}.iou_token.weight"] = torch.randn(1, UNTIED.sam2.d_model)
  path = tmp_path_factory.mktemp("pth") / "iter_1251.pth"
  torch.save({"state_dict": tensors, "iter": 1251}, path)
  return path, tensors


def convert(checkpoint: Path, base: Path, dst: Path, **options: object) -> dict:
  args = from_hf.Args(src=str(checkpoint), dst=dst, base=str(base), lora_alpha=ALPHA, **options)
  return from_hf.convert(args)


def test_merged_adapters(base, checkpoint, tmp_path):
  path, tensors = checkpoint
  report = convert(path, base, tmp_path / "model")
  assert report["notes"] == ["LoRA of rank 3 and alpha 12, merged"]
  start, trained = (model_directory.load(str(p)).model for p in (base, tmp_path / "model"))
  layers = [m.qwen.language_model.layers for m in (start, trained)]
  for i in range(UNTIED.text.num_layers):
    old, new = (np.asarray(x.mlp.down_proj.weight[...][i]) for x in layers)
    a, b = (tensors[f"{LAYER}.{i}.mlp.down_proj.lora_{x}.default.weight"] for x in "AB")
    np.testing.assert_allclose(new, old + (ALPHA / RANK) * (b @ a).numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(new - old).max() > 0.1
  head = "mllm.model.base_model.model.lm_head.modules_to_save.default.weight"
  language = trained.qwen.language_model
  np.testing.assert_array_equal(language.lm_head.weight[...], tensors[head])
  np.testing.assert_array_equal(
    language.embed_tokens.weight[...], start.qwen.language_model.embed_tokens.weight[...]
  )
  np.testing.assert_array_equal(
    trained.text_hidden_fcs.fc2.bias[...], tensors["text_hidden_fcs.2.bias"]
  )
  assert not trained.config.lora.rank


def test_kept_adapters_merge_to_the_same_model(base, checkpoint, tmp_path):
  convert(checkpoint[0], base, tmp_path / "merged")
  convert(checkpoint[0], base, tmp_path / "kept", lora="keep")
  kept = model_directory.load(str(tmp_path / "kept")).model
  assert kept.config.lora == LoraConfig(RANK, ALPHA)
  merged = model_directory.load(str(tmp_path / "merged")).model
  weights = [
    m.qwen.language_model.layers.self_attn.q_proj.weight for m in (merge_lora(kept), merged)
  ]
  np.testing.assert_allclose(weights[0][...], weights[1][...], rtol=1e-5, atol=1e-5)


def test_a_peft_folder_comes_out(base, checkpoint, tmp_path):
  path, tensors = checkpoint
  convert(path, base, tmp_path / "kept", lora="keep")
  dst = tmp_path / "adapter"
  to_hf.convert(to_hf.Args(src=str(tmp_path / "kept"), dst=dst, adapter=True))
  config = json.loads((dst / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
  found = load_file(dst / "adapter_model.safetensors")
  wanted = {
    key.removeprefix("mllm.model.").replace(".default.", "."): value
    for key, value in tensors.items()
    if "lora_" in key
  }
  assert found.keys() == wanted.keys()
  assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_adapters_of_a_training_run(tmp_path):
  """A workdir exports its newest checkpoint: adapters alone, or merged like its own model."""
  record = tiny.write_train(tmp_path / "train.tfrecord", [tiny.train_record(i) for i in range(3)])
  base = tmp_path / "base"
  model_directory.save(base, tiny.random_model(), tiny.tokenizer(), tiny.IMAGE)
  data = dataclasses.replace(tiny.train_config().data, train=record)
  optim = dataclasses.replace(tiny.train_config().optim, steps=2, learning_rate=1e-2)
  config = tiny.train_config(data=data, optim=optim, base=str(base), checkpoint_every=1)
  workdir = tmp_path / "run"
  loop.train(config, workdir)
  to_hf.convert(to_hf.Args(src=str(workdir), dst=tmp_path / "adapter", adapter=True))
  adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  key = "base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_B.weight"
  assert adapter[key].abs().max() > 0
  assert len(adapter) == 2 * 7 * tiny.MODEL.text.num_layers
  merged, own = tmp_path / "merged", tmp_path / "own"
  to_hf.convert(to_hf.Args(src=str(workdir), dst=merged))
  to_hf.convert(to_hf.Args(src=str(workdir / "model"), dst=own))
  a, b = (load_file(folder / "model.safetensors") for folder in (merged, own))
  assert a.keys() == b.keys()
  for name in a:
    torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_problems_of_a_training_checkpoint(base, checkpoint, tmp_path):
  with pytest.raises(ValueError, match="--base takes the start model"):
    from_hf.convert(from_hf.Args(src=str(checkpoint[0]), dst=tmp_path / "model"))
  tensors = dict(checkpoint[1])
  del tensors[f"{LAYER}.1.mlp.up_proj.lora_A.default.weight"]
  tensors["text_hidden_fcs.4.bias"] = torch.zeros(2)
  torch.save({"state_dict": tensors}, tmp_path / "bad.pth")
  with pytest.raises(ValueError, match=r"1 problem: text_hidden_fcs\.4\.bias: unknown key"):
    convert(tmp_path / "bad.pth", base, tmp_path / "model")
  del tensors["text_hidden_fcs.4.bias"]
  torch.save({"state_dict": tensors}, tmp_path / "bad.pth")
  with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight: missing"):
    convert(tmp_path / "bad.pth", base, tmp_path / "model")
  assert not (tmp_path / "model").exists()


def test_names():
  names, frozen = export_names(
    [
      "mllm.model.base_model.model.model.language_model.layers.0.mlp.up_proj.base_layer.weight",
      "mllm.model.model.visual.pos_embed.weight",
      "mllm.model.base_model.model.lm_head.original_module.weight",
      "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma",
    ]
  )
  assert list(names) == [
    "model.model.language_model.layers.0.mlp.up_proj.weight",
    "model.model.visual.pos_embed.weight",
    "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.g_weight",
  ]
  assert frozen == ["mllm.model.base_model.model.lm_head.original_module.weight"]
  with pytest.raises(ValueError, match="are both lm_head"):
    export_names(["mllm.lm_head.weight", "lm_head.weight"])
