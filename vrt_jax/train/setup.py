"""What a run starts from: workdir, data, tokenizer and base model."""

import dataclasses
import json
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from vrt_jax import model_directory
from vrt_jax.config import LoraConfig, TrainConfig
from vrt_jax.data.chat import ChatTokenizer, train_bpe
from vrt_jax.data.shapes import corpus, write_shapes
from vrt_jax.files import write_whole
from vrt_jax.model_directory import Loaded
from vrt_jax.models.lora import add_lora
from vrt_jax.models.sa2va import Sa2VA
from vrt_jax.runtime import barrier, is_leader

CONFIG_FILE = "config.json"
CORPUS_SAMPLES = 3000
"""Shapes samples whose texts train a tokenizer."""


def check_workdir(config: TrainConfig, workdir: Path) -> None:
  """Refuses a workdir that belongs to a run of another configuration.

  Raises:
    ValueError: it names the first field that differs; or its config.json is unreadable.
  """
  path = workdir / CONFIG_FILE
  if not path.is_file():
    return
  try:
    found = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON ({error}): delete {workdir} or choose another") from error
  if difference := first_difference(found, as_json(config)):
    field, old, new = difference
    raise ValueError(
      f"{workdir} holds a run with {field} = {old}, not {new}: choose another --workdir or "
      "delete it"
    )


def write_config(config: TrainConfig, workdir: Path) -> None:
  """Records the configuration of a run in its workdir; the leader writes, the others wait."""
  if is_leader():
    _write_config(config, workdir)
  barrier("the configuration is written")


def _write_config(config: TrainConfig, workdir: Path) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(workdir / CONFIG_FILE, json.dumps(as_json(config), indent=2) + "\n")


def as_json(config: TrainConfig) -> dict:
  """The configuration as it reads back from JSON (tuples as lists)."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def first_difference(old: dict, new: dict, prefix: str = "") -> tuple[str, object, object] | None:
  """The first field in which two nested configurations differ, with both values."""
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      if difference := first_difference(a, b, f"{prefix}{key}."):
        return difference
    elif a != b:
      return f"{prefix}{key}", a, b
  return None


def data_patterns(config: TrainConfig, workdir: Path) -> tuple[str, str]:
  """Globs of the training and held-out files; makes the shapes world where none are named.

  The leader makes it, the others wait.
  """
  data = config.data
  if data.train:
    return data.train, data.eval
  folder = workdir / "data"
  train, held_out = folder / "shapes_train-*.tfrecord", folder / "shapes_eval.tfrecord"
  made = folder / "complete"
  if is_leader() and not made.is_file():
    write_shapes(
      folder,
      data.shapes_train_samples,
      data.shapes_eval_samples,
      data.shapes_seed,
      task=data.shapes_task,
    )
    made.touch()
  barrier("the data are there")
  return str(train), data.eval or (str(held_out) if data.shapes_eval_samples else "")


def base_model(config: TrainConfig, mesh: Mesh | None = None) -> Loaded:
  """The model a run starts from: a model directory, divided over the mesh, or random weights.

  Raises:
    ValueError: `config.base` is no model directory, or tokenizer and model do not fit.
  """
  if config.base:
    return model_directory.load(config.base, mesh=mesh)
  tokenizer = (
    ChatTokenizer.from_dir(config.tokenizer) if config.tokenizer else shapes_tokenizer(config)
  )
  if tokenizer.vocab_size > config.model.text.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size is "
      f"{config.model.text.vocab_size}"
    )
  plain = dataclasses.replace(config.model, lora=LoraConfig())
  return Loaded(Sa2VA(plain, nnx.Rngs(config.seed)), tokenizer, config.image)


def with_adapters(loaded: Loaded, config: TrainConfig) -> Loaded:
  """The model with fresh LoRA adapters where the recipe has them."""
  model = loaded.model
  if config.model.lora.rank:
    model = add_lora(model, config.model.lora, config.seed)
  return dataclasses.replace(loaded, model=model)


def shapes_tokenizer(config: TrainConfig) -> ChatTokenizer:
  """A byte-level BPE of the size of the model's vocabulary, trained on shapes texts."""
  texts = corpus(CORPUS_SAMPLES, config.data.shapes_seed)
  special = 5
  return ChatTokenizer(train_bpe(texts, config.model.text.vocab_size - special))
