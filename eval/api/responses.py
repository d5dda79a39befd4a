"""`responses.jsonl`: one line a finished question, from which an interrupted run goes on."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vrt_jax.config import from_dict
from vrt_jax.files import write_whole

RESPONSES_FILE = "responses.jsonl"
REQUEST_FILE = "request.json"


@dataclasses.dataclass(frozen=True)
class Response:
  """What came back for one question: an answer, or an error after all attempts."""

  key: str
  question: str
  text: str = ""
  sent_size: tuple[int, int] = (0, 0)
  """(height, width) of the picture that was sent."""
  finish_reason: str = ""
  model: str = ""
  input_tokens: int | None = None
  output_tokens: int | None = None
  seconds: float = 0.0
  """From the first attempt to the answer."""
  error: str = ""
  """"" for an answer."""


class ResponseLog:
  """The answers of one folder, appended to as they come; `with` holds it for one process."""

  def __init__(self, folder: Path, settings: Mapping[str, Any]):
    """`settings` (JSON) decide what is asked; they are written beside the answers."""
    self.folder = folder
    self.path = folder / RESPONSES_FILE
    self.responses: dict[str, Response] = {}
    self._settings = settings
    self._open = contextlib.ExitStack()

  def __enter__(self) -> "ResponseLog":
    """Opens and reads.

    Raises:
      ValueError: the folder has answers to other settings, is in use, or its file is damaged
        elsewhere than in its last line, which a kill may have cut.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(self.path.open("a+b"))
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(f"another run is writing to {self.folder}") from None
      lines = self._whole_lines()
      check_settings(self.folder / REQUEST_FILE, self._settings, has_answers=bool(lines))
      for number, line in enumerate(lines, start=1):
        self._remember(self._parse(line, number))
      self._open = stack.pop_all()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._open.close()

  def append(self, response: Response) -> None:
    """Adds one line; it is on the disk when this returns."""
    self._file.write(json.dumps(dataclasses.asdict(response)).encode() + b"\n")
    self._file.flush()
    os.fsync(self._file.fileno())
    self._remember(response)

  def answered(self, key: str) -> bool:
    """Whether a question has an answer; one with an error is asked again."""
    return key in self.responses and not self.responses[key].error

  def _remember(self, response: Response) -> None:
    if not (response.error and self.answered(response.key)):
      self.responses[response.key] = response

  def _whole_lines(self) -> list[bytes]:
    """The file's lines; what stands behind the last line end is cut off the file."""
    self._file.seek(0)
    content = self._file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
      self._file.truncate(len(whole))
    return whole.split(b"\n")[:-1]

  def _parse(self, line: bytes, number: int) -> Response:
    where = f"{self.path}, line {number}"
    try:
      fields = json.loads(line)
      if not isinstance(fields, dict):
        raise ValueError("not an object")
      return from_dict(Response, fields, where)
    except (ValueError, TypeError) as error:
      raise ValueError(f"{where} is damaged: {error}") from None


def check_settings(path: Path, settings: Mapping[str, Any], has_answers: bool) -> None:
  """Writes the settings of a new folder, and compares them with those of an old one.

  Raises:
    ValueError: they differ, and the folder has answers.
  """
  if has_answers:
    try:
      found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
      raise ValueError(f"{path} is missing or damaged: what was asked is not known") from None
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
      name = differing[0]
      raise ValueError(
        f"{path.parent} has answers to another {name} ({_short(found.get(name))}, now"
        f" {_short(settings[name])}): give another --out"
      )
  else:
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def _short(value: object) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
