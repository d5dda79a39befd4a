"""SAM 2 checkpoints: transformers' folders and Meta's files, all four sizes."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Sam2Model

from converters import from_hf, sam2_config, sam2_rules, to_hf
from converters.conversion import convert_tensors, expected_sam2
from converters.export import rename
from converters.streams import Checksums, whole
from tests import tiny
from tests.parity.sam2_weights import hf_config, load_torch, random_torch_model
from vrt_jax import model_directory
from vrt_jax.config import Sam2Config
from vrt_jax.sizes import SAM2_SIZES

CONFIG = tiny.MODEL.sam2


class Arrays:
  """A source of arrays in memory."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self._arrays = arrays
    self.shapes = {k: v.shape for k, v in arrays.items()}
    self.dtypes = {k: v.dtype.name for k, v in arrays.items()}
    self.problems: list[str] = []
    self.lost: frozenset[str] = frozenset()

  def rows(self, key: str, start: int, stop: int) -> np.ndarray:
    return self._arrays[key][start:stop]


def meta_tensors(config: Sam2Config, seed: int = 0) -> dict[str, torch.Tensor]:
  """Meta's names with random values."""
  rng = np.random.default_rng(seed)
  shapes = expected_sam2(config)[0]
  arrays = rename(
    sam2_rules.META, {n: whole(rng.normal(size=s).astype("f4")) for n, s in shapes.items()}
  )
  return {key: torch.from_numpy(array.read(0, array.shape[0])) for key, array in arrays.items()}


def save_hf(folder: Path) -> Sam2Model:
  model = random_torch_model(CONFIG)
  model.save_pretrained(folder)
  return model


def leaves(model: nnx.Module) -> dict[str, np.ndarray]:
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def assert_same(ours: nnx.Module, theirs: nnx.Module) -> None:
  a, b = leaves(ours), leaves(theirs)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_folder_of_transformers(tmp_path):
  theirs = save_hf(tmp_path / "src")
  from_hf.convert(from_hf.Args(src=str(tmp_path / "src"), dst=tmp_path / "sam2"))
  ours = model_directory.load_sam2(str(tmp_path / "sam2"))
  assert_same(ours, load_torch(CONFIG, theirs.state_dict()))


def test_the_way_back_to_transformers(tmp_path):
  model = tiny.random_model()
  model_directory.save(tmp_path / "model", model, tiny.tokenizer(), tiny.IMAGE)
  to_hf.convert(to_hf.Args(src=str(tmp_path / "model"), dst=tmp_path / "hf", layout="sam2"))
  theirs, info = Sam2Model.from_pretrained(
    tmp_path / "hf", dtype=torch.float32, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert sam2_config.sam2_from_hf(theirs.config.to_dict()) == CONFIG
  assert_same(model.sam2, load_torch(CONFIG, theirs.state_dict()))
  assert_same(model.sam2, model_directory.load_sam2(str(tmp_path / "model")))


@pytest.mark.parametrize("size", SAM2_SIZES)
def test_sizes_are_told_from_shapes(size):
  shapes = expected_sam2(SAM2_SIZES[size])[0]
  arrays = {n: whole(np.broadcast_to(np.float32(0), s)) for n, s in shapes.items()}
  names = rename(sam2_rules.META, arrays)
  found = sam2_config.sam2_from_shapes({key: array.shape for key, array in names.items()})
  assert found == SAM2_SIZES[size]


def test_unknown_sizes_are_refused():
  with pytest.raises(ValueError, match="width 7 and 1 blocks is none of tiny 96 x 12"):
    sam2_config.sam2_from_shapes(
      {
        "image_encoder.trunk.patch_embed.proj.bias": (7,),
        "image_encoder.trunk.blocks.0.norm1.bias": (7,),
      }
    )


def test_meta_and_transformers_names_agree():
  """One random model under both names gives the same parameters."""
  meta = {k: v.numpy() for k, v in meta_tensors(CONFIG).items()}
  shapes = expected_sam2(CONFIG)[0]
  ours, _ = convert_tensors(sam2_rules.META, Arrays(meta), shapes, Checksums())
  hf = {k: a.read(0, a.shape[0]) for k, a in rename(sam2_rules.HF, ours).items()}
  model = Sam2Model(hf_config(CONFIG))
  state = model.state_dict()
  assert {k: v.shape for k, v in hf.items()} == {
    k: tuple(v.shape) for k, v in state.items() if "shared_image_embedding" not in k
  }
  back, _ = convert_tensors(sam2_rules.HF, Arrays(hf), shapes, Checksums())
  for name, array in ours.items():
    rows = (0, array.shape[0])
    np.testing.assert_array_equal(array.read(*rows), back[name].read(*rows), err_msg=name)


def test_a_file_of_meta(tmp_path, monkeypatch):
  """A .pt with the memory of SAM 2.1; the tiny model stands in for a released size."""
  monkeypatch.setitem(SAM2_SIZES, "test", CONFIG)
  tensors = meta_tensors(CONFIG)
  memory = {
    "memory_encoder.fuser.layers.0.gamma": torch.randn(4),
    "obj_ptr_tpos_proj.weight": torch.randn(2, 2),
    "no_obj_embed_spatial": torch.randn(1, 4),
  }
  torch.save({"model": tensors | memory}, tmp_path / "sam2.pt")
  dst = tmp_path / "sam2"
  report = from_hf.convert(from_hf.Args(src=str(tmp_path / "sam2.pt"), dst=dst))
  assert report["ignored"] == {sam2_rules.MEMORY: sorted(memory)}
  assert "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.g_weight" in report["carried"]
  found = leaves(model_directory.load_sam2(str(dst)))
  key = "sam_mask_decoder.output_upscaling.3.weight"
  np.testing.assert_array_equal(found["mask_decoder.output_upscaling.2.weight"], tensors[key])
  with pytest.raises(ValueError, match="is SAM 2 alone"):
    model_directory.load(str(dst))


def test_the_second_copy_of_the_fourier_matrix_must_agree(tmp_path):
  model = save_hf(tmp_path / "src")
  model.shared_image_embedding.positional_embedding.add_(1)
  model.save_pretrained(tmp_path / "src")
  with pytest.raises(ValueError, match=re.escape("shared_image_embedding.positional_embedding:")):
    from_hf.convert(from_hf.Args(src=str(tmp_path / "src"), dst=tmp_path / "sam2"))


def test_a_swapped_name_would_be_seen():
  """Negative control of the comparisons above: two exchanged layers change the parameters."""
  meta = {k: v.numpy() for k, v in meta_tensors(CONFIG).items()}
  shapes = expected_sam2(CONFIG)[0]
  ours, _ = convert_tensors(sam2_rules.META, Arrays(meta), shapes, Checksums())
  a, b = (f"sam_mask_decoder.iou_prediction_head.layers.{i}.bias" for i in (0, 1))
  swapped = meta | {a: meta[b], b: meta[a]}
  other, _ = convert_tensors(sam2_rules.META, Arrays(swapped), shapes, Checksums())
  name = "sam2.mask_decoder.iou_prediction_head.layers.0.bias"
  first, second = (jnp.asarray(p[name].read(0, p[name].shape[0])) for p in (ours, other))
  assert not np.allclose(first, second)
