"""Reads config.json files and collects what is wrong with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_config(folder: Path) -> dict[str, Any]:
  """config.json of a folder; ValueError where it is missing or no JSON object."""
  file = folder / "config.json"
  if not file.is_file():
    raise ValueError(f"{folder} has no config.json")
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{file} is not a JSON object")
  return config


class Reader:
  """Reads fields of a JSON object and collects what is wrong with them."""

  def __init__(self, values: Mapping[str, Any], where: str, problems: list[str]):
    self._values, self._where, self._problems = values, where, problems

  def section(self, name: str) -> "Reader":
    """A nested object."""
    values = self._values.get(name)
    if not isinstance(values, dict):
      self._problems.append(f"{self._where}: no {name}")
      values = {}
    return Reader(values, f"{self._where}: {name}", self._problems)

  def has(self, name: str) -> bool:
    """Whether the field is there."""
    return name in self._values

  def number(self, name: str, kind: type[int] | type[float] = int) -> Any:
    """A positive number; 1 where it is missing or another type, which is a problem."""
    value: Any = self._values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
      self._problems.append(f"{self._where}: {name} is {value!r}, not a positive {kind.__name__}")
      return kind(1)
    return kind(value)

  def numbers(self, name: str) -> tuple[int, ...]:
    """A list of integers."""
    value = self._values.get(name)
    if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
      self._problems.append(f"{self._where}: {name} is {value!r}, not a list of integers")
      return ()
    return tuple(value)

  def three_numbers(self, name: str) -> tuple[int, int, int]:
    """A list of three integers."""
    values = self.numbers(name)
    if len(values) != 3:
      if values:
        self._problems.append(f"{self._where}: {name} is {list(values)}, not three integers")
      return 1, 1, 1
    return values[0], values[1], values[2]

  def fixed(self, name: str, *allowed: object) -> None:
    """A field that, where it is there, must have one of the values that our models compute."""
    value = self._values.get(name, allowed[0])
    if value not in allowed:
      self._problems.append(
        f"{self._where}: {name} {value!r} is not supported, only {allowed[0]!r}"
      )
