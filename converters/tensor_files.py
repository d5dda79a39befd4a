"""Tensors of a checkpoint, a few rows at a time: safetensors, or pickles through torch."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import safetensors

from converters.rules import Shape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WRAPPERS = ("state_dict", "model", "module")
"""Where training checkpoints keep the tensors: mmengine, Meta, DeepSpeed."""


class TensorSource(Protocol):
  """Named tensors with shapes and dtypes known beforehand.

  What is wrong with its files is kept, so that `conversion.convert_tensors` can list it together
  with wrong names and shapes; nothing may be read from a source with problems.
  """

  shapes: dict[str, Shape]
  dtypes: dict[str, str]
  problems: list[str]
  lost: frozenset[str]
  """Names that the index has in shards that cannot be read."""

  def rows(self, key: str, start: int, stop: int) -> np.ndarray:
    """Rows start .. stop - 1 along the first axis."""


def read_tensor(source: TensorSource, key: str) -> np.ndarray:
  """The whole tensor."""
  shape = source.shapes[key]
  return source.rows(key, 0, shape[0] if shape else 1)


class SafetensorsFiles:
  """The tensors of safetensors shards. Files are opened a read, so that none stays mapped."""

  def __init__(self, shards: list[Path], index: dict[str, str] | None = None):
    """Reads the headers of all shards.

    `problems` has every shard that is missing or damaged, tensor that is no floating-point one,
    name in two shards, and difference between index and shards.
    """
    self.shapes: dict[str, Shape] = {}
    self.dtypes: dict[str, str] = {}
    self.problems: list[str] = []
    self._files: dict[str, Path] = {}
    broken: list[str] = []
    for file in shards:
      try:
        self._read_header(file)
      except ValueError as error:
        self.problems.append(str(error))
        broken.append(file.name)
    names = {key: file.name for key, file in self._files.items()}
    self.lost = lost_names(index or {}, names, broken)
    if index is not None:
      self.problems += index_problems(index, names, self.lost)

  def _read_header(self, file: Path) -> None:
    shard = _open(file)
    for key in shard.keys():
      tensor = shard.get_slice(key)
      dtype = tensor.get_dtype()
      if key in self._files:
        self.problems.append(f"{key}: in {self._files[key].name} and in {file.name}")
        continue
      if dtype not in _DTYPES:
        self.problems.append(f"{key}: dtype {dtype} is none of {', '.join(_DTYPES)}")
      self._files[key] = file
      self.shapes[key] = tuple(tensor.get_shape())
      self.dtypes[key] = _DTYPES.get(dtype, dtype)

  def rows(self, key: str, start: int, stop: int) -> np.ndarray:
    """Rows start .. stop - 1; a scalar whatever they are."""
    shard = _open(self._files[key])
    if not self.shapes[key]:
      return shard.get_tensor(key)
    return shard.get_slice(key)[start:stop]


class TorchFiles:
  """The tensors of torch pickles (.bin, .pt, .pth), memory-mapped; only tensors are unpickled."""

  def __init__(self, shards: list[Path], index: dict[str, str] | None = None):
    """Maps all files; problems as in `SafetensorsFiles`."""
    import torch

    self._tensors: dict[str, torch.Tensor] = {}
    self.problems: list[str] = []
    owners: dict[str, str] = {}
    broken: list[str] = []
    for file in shards:
      try:
        tensors = _load_torch(file)
      except ValueError as error:
        self.problems.append(str(error))
        broken.append(file.name)
        continue
      for key, value in tensors.items():
        if key in owners:
          self.problems.append(f"{key}: in {owners[key]} and in {file.name}")
          continue
        if not value.is_floating_point():
          self.problems.append(f"{key}: dtype {value.dtype} is no floating-point one")
        owners[key] = file.name
        self._tensors[key] = value
    self.lost = lost_names(index or {}, owners, broken)
    if index is not None:
      self.problems += index_problems(index, owners, self.lost)
    self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}
    self.dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in self._tensors.items()}

  def rows(self, key: str, start: int, stop: int) -> np.ndarray:
    """Rows start .. stop - 1; a scalar whatever they are."""
    import torch

    value = self._tensors[key].detach()
    value = (value[start:stop] if value.ndim else value).contiguous()
    if value.dtype == torch.bfloat16:
      return value.view(torch.int16).numpy().view("bfloat16")
    return value.numpy()


class Renamed:
  """A source whose tensors have other names: new name -> old name; the rest is left out."""

  def __init__(self, source: TensorSource, names: dict[str, str]):
    self._source, self._names = source, names
    self.shapes = {new: source.shapes[old] for new, old in names.items()}
    self.dtypes = {new: source.dtypes[old] for new, old in names.items()}
    self.problems = source.problems
    self.lost = frozenset(new for new, old in names.items() if old in source.lost)

  def rows(self, key: str, start: int, stop: int) -> np.ndarray:
    """Rows start .. stop - 1."""
    return self._source.rows(self._names[key], start, stop)


class Resized:
  """A source in which the tensors `keys` have `num_rows` rows.

  Rows beyond are cut off; rows that are missing are the mean of all rows. Source: transformers'
  resize_token_embeddings, which draws new rows around that mean.
  """

  def __init__(self, source: TensorSource, keys: list[str], num_rows: int):
    self._source, self._keys = source, frozenset(keys)
    self.shapes = {
      key: (num_rows, *shape[1:]) if key in self._keys else shape
      for key, shape in source.shapes.items()
    }
    self.dtypes, self.problems, self.lost = source.dtypes, source.problems, source.lost

  def rows(self, key: str, start: int, stop: int) -> np.ndarray:
    """Rows start .. stop - 1."""
    num_rows = self._source.shapes[key][0] if key in self._keys else stop
    there = self._source.rows(key, min(start, num_rows), min(stop, num_rows))
    new = stop - start - len(there)
    if key not in self._keys or new <= 0:
      return there
    mean = read_tensor(self._source, key).astype(np.float32).mean(axis=0, keepdims=True)
    return np.concatenate([there, np.repeat(mean, new, axis=0).astype(there.dtype)])


def open_folder(folder: Path) -> TensorSource:
  """The tensors of a Hugging Face folder: safetensors where it has them, .bin otherwise.

  Raises:
    ValueError: it has neither.
  """
  kinds: list[tuple[str, str, Callable]] = [
    (INDEX, SINGLE, SafetensorsFiles),
    (TORCH_INDEX, TORCH_SINGLE, TorchFiles),
  ]
  for index_name, single, cls in kinds:
    if (folder / index_name).is_file():
      index = read_index(folder / index_name)
      return cls([folder / name for name in sorted(set(index.values()))], index)
    if (folder / single).is_file():
      return cls([folder / single])
  names = ", ".join(name for kind in kinds for name in kind[:2])
  raise ValueError(f"{folder} holds no tensors: it has none of {names}")


def read_index(file: Path) -> dict[str, str]:
  """Tensor name -> shard; ValueError where the file is no JSON with a "weight_map"."""
  try:
    return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} is not an index of shards ({error})") from error


def lost_names(index: dict[str, str], found: dict[str, str], broken: list[str]) -> frozenset[str]:
  """The tensors of an index that are in `broken` shards only."""
  return frozenset(key for key, name in index.items() if name in broken and key not in found)


def index_problems(index: dict[str, str], found: dict[str, str], lost: frozenset[str]) -> list[str]:
  """Where an index and the readable shards (tensor -> file name) differ."""
  absent = [
    f"{k}: in the index, not in {v}" for k, v in index.items() if k not in found and k not in lost
  ]
  extra = [f"{k}: in {v}, not in the index" for k, v in found.items() if k not in index]
  return sorted(absent) + sorted(extra)


def _open(file: Path) -> safetensors.safe_open:
  if not file.is_file():
    raise ValueError(f"{file.name}: no such shard")
  try:
    return safetensors.safe_open(file, "numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file.name}: damaged ({error})") from error


def _load_torch(file: Path) -> dict:
  """Name -> tensor of a pickle; a training checkpoint's other tensors (optimiser, ..) are left."""
  import torch

  if not file.is_file():
    raise ValueError(f"{file.name}: no such file")
  try:
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
  except (RuntimeError, EOFError, ValueError, OSError) as error:
    raise ValueError(f"{file.name}: damaged ({str(error).splitlines()[0]})") from error
  except pickle.UnpicklingError as error:
    raise ValueError(
      f"{file.name}: holds Python objects that are not loaded for safety; save its state_dict alone"
    ) from error
  for name in _WRAPPERS:
    if isinstance(content, dict) and isinstance(content.get(name), dict):
      content = content[name]
      break
  if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
    raise ValueError(f"{file.name}: no state_dict of tensors")
  return content
