"""What `--checkpoint` may name: from any of it to a model directory."""

import re
from pathlib import Path

from converters import from_hf
from vrt_jax import model_directory
from vrt_jax.runtime import barrier, is_leader, say

CONVERTED = "model"
"""Folder of the output into which a Hugging Face checkpoint is converted."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(checkpoint: str, out: Path) -> str:
  """A path for `model_directory.load`.

  A model directory or a shipped model's name stays; a training's workdir means its `model`; a
  Hugging Face folder or id is converted into `out/model`, once.

  Raises:
    ValueError: it is none of these, or an unfinished training.
  """
  path = Path(checkpoint)
  if (path / "model" / "config.json").is_file():
    return str(path / "model")
  if (path / "checkpoints").is_dir():
    raise ValueError(f"{path} is a training that has not finished: it has no model/ yet")
  is_hub_id = not path.exists() and _HUB_ID.fullmatch(checkpoint)
  if not is_hub_id and not any(path.glob("*.safetensors")):
    return checkpoint
  target = out / CONVERTED
  if is_leader() and not target.is_dir():
    say(f"converting {checkpoint} into {target}")
    from_hf.convert(from_hf.Args(src=checkpoint, dst=target))
  barrier("the checkpoint is converted")
  model_directory.resolve(str(target))
  return str(target)
