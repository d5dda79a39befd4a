"""requirements.lock holds versions that pyproject.toml allows."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = dict(
  line.lower().replace("_", "-").split("==")
  for line in (ROOT / "requirements.lock").read_text().splitlines()
  if line and not line.startswith("#")
)


def requirements() -> list[Requirement]:
  extras = PROJECT["optional-dependencies"]
  lines = [*PROJECT["dependencies"], *extras["test"], *extras["docs"], *extras["dev"]]
  found = [Requirement(line) for line in lines]
  return [r for r in found if r.name != PROJECT["name"]]


def test_every_requirement_is_locked_to_a_version_it_allows():
  for requirement in requirements():
    locked = LOCKED[requirement.name.lower()]
    assert requirement.specifier.contains(locked), f"{requirement}: {locked}"
