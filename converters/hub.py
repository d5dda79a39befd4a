"""Checkpoints by path or by the id of a Hugging Face repository."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.py"]
_PICKLES = ["*.bin", "*.pt"]


def local_path(src: str, revision: str) -> Path:
  """The folder or file that `src` names, downloaded where it is a hub id and no local path.

  Source code in a repository is copied along and never run.

  Raises:
    ValueError: neither a path nor a hub id, or the download failed.
  """
  path = Path(src)
  if path.exists():
    return path
  if not _HUB_ID.fullmatch(src):
    raise ValueError(f"{src} does not exist and is no id of a hub repository")
  folder = _download(src, revision, _PATTERNS)
  if not any(folder.glob("*.safetensors")):
    folder = _download(src, revision, _PATTERNS + _PICKLES)
  return folder


def _download(repo: str, revision: str, patterns: list[str]) -> Path:
  import huggingface_hub
  from huggingface_hub.errors import HTTPError  # of the HTTP client that it uses

  try:
    return Path(
      huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
    )
  except (HTTPError, OSError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
      f"{repo} does not exist here and cannot be downloaded: {reason} (what has arrived is kept: "
      "run the same command again)"
    ) from error
