"""Rules of the house that hold for every file: imports, size, paths, configuration fields."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vrt_jax import config as config_module

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vrt_jax"
OUTSIDE = ("configs", "eval", "scripts", "converters")
MAX_LINES = 400

ROOMS = (
  ("types", "config", "cli", "code_version", "files", "text_panel", "cores"),
  ("runtime", "sizes"),
  ("ops", "partial", "placement"),
  ("data", "models", "draw"),
  ("model_directory", "losses", "metrics"),
  ("generate", "viewer"),
  ("rl",),
  ("evaluate",),
  ("train",),
  ("serve",),
  ("predict",),
)
"""A file imports from its own room and from earlier rows; rooms of one row know nothing of each
other."""
LEVELS = {room: level for level, row in enumerate(ROOMS) for room in row}

MACHINE_PATH = re.compile(
  r"(?<![\w.*}~/])/(?:" + "|".join(("home", "root", "Users", "work", "farm", "mnt", "tmp")) + r")/"
)


def python_files(*folders: str) -> list[Path]:
  """Every Python file of the given folders of the repository."""
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SOURCES = python_files("vrt_jax", *OUTSIDE)
ALL_FILES = [*SOURCES, *python_files("tests")]


def name_of(path: Path) -> str:
  """Path from the repository's root: the id of a parametrised test."""
  return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
  """The syntax tree of a file."""
  return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """(line, dotted name) of every import, those inside functions too.

  `from a import b` gives "a.b", whether b is a module or not; a relative import starts with dots.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = "." * node.level + (node.module or "")
      yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward_imports(room: str, tree: ast.Module) -> list[str]:
  """What a file of `room` imports against the order of the rooms."""
  found = []
  for line, name in imported_modules(tree):
    top, _, rest = name.partition(".")
    if top in ("", *OUTSIDE, "tests"):  # relative, or outside the package
      found.append(f"line {line}: {name}")
    elif top == "vrt_jax" and rest:
      other = rest.partition(".")[0]
      if other not in LEVELS or (other != room and LEVELS[other] >= LEVELS[room]):
        found.append(f"line {line}: {name}")
  return found


def broad_handlers(tree: ast.Module) -> list[int]:
  """Lines of `except:`, `except Exception` and `except BaseException`, in tuples too."""
  lines = []
  for node in ast.walk(tree):
    if isinstance(node, ast.ExceptHandler):
      caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
      names = {c.id for c in caught if isinstance(c, ast.Name)}
      if node.type is None or names & {"Exception", "BaseException"}:
        lines.append(node.lineno)
  return lines


def test_the_files_are_found():
  names = {name_of(path) for path in ALL_FILES}
  assert {"vrt_jax/config.py", "vrt_jax/train/loop.py", "tests/test_hygiene.py"} <= names


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_compiles(path):
  compile(path.read_text(encoding="utf-8"), name_of(path), "exec", dont_inherit=True)


def test_every_room_has_its_place():
  on_disk = {
    path.stem
    for path in PACKAGE.iterdir()
    if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
  }
  assert on_disk - set(LEVELS) == set(), "give new rooms a place in ROOMS"
  # a room of the order that is not there would be a dead entry
  assert set(LEVELS) - on_disk == set()


@pytest.mark.parametrize("path", python_files("vrt_jax"), ids=name_of)
def test_imports_go_one_way(path):
  relative = path.relative_to(PACKAGE)
  room = relative.parts[0].removesuffix(".py")
  if room == "__init__":
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in parse(path).body)
  else:
    assert upward_imports(room, parse(path)) == []


def test_upward_imports_are_seen():
  bad = {
    "models": "from vrt_jax.data.chat import ChatTokenizer",
    "data": "from vrt_jax import models",
    "ops": "def f():\n  import vrt_jax.generate.decode",
    "train": "import configs.shapes_pretrain",
    "generate": "from .decode import generate",
    "losses": "from vrt_jax.metrics import match_ious",
  }
  assert all(upward_imports(room, ast.parse(code)) for room, code in bad.items())
  good = "import jax\nfrom vrt_jax import config\nfrom vrt_jax.data.trace import SEG"
  assert upward_imports("generate", ast.parse(good)) == []


@pytest.mark.parametrize("path", python_files("vrt_jax", "configs", "eval", "scripts"), ids=name_of)
def test_no_torch_outside_converters_and_tests(path):
  tops = {name.partition(".")[0] for _, name in imported_modules(parse(path))}
  # torch costs seconds and gigabytes: only conversion and parity tests pay for it
  assert tops & {"torch", "torchvision", "transformers"} == set()


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_no_broad_except(path):
  assert broad_handlers(parse(path)) == []


def test_broad_excepts_are_seen():
  for caught in (":", " Exception:", " (OSError, Exception) as error:", " BaseException:"):
    assert broad_handlers(ast.parse(f"try:\n  f()\nexcept{caught}\n  pass")) == [3]
  assert broad_handlers(ast.parse("try:\n  f()\nexcept (OSError, KeyError):\n  pass")) == []


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_file_is_not_too_long(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_paths_of_a_machine():
  texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", ".ci/run")]
  found = []
  for path in [*ALL_FILES, *texts]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
      if MACHINE_PATH.search(line):
        found.append(f"{name_of(path)}:{number}: {line.strip()}")
  assert found == []


def test_machine_paths_are_seen():
  folder = "ho" + "me"
  assert MACHINE_PATH.search(f'open("/{folder}/me/data")')
  assert not MACHINE_PATH.search(f"assets/{folder}/me")


def test_every_config_field_is_read():
  read = {
    node.attr
    for path in python_files("vrt_jax")
    if path != PACKAGE / "config.py"
    for node in ast.walk(parse(path))
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
  }
  unread = [
    f"{name}.{field.name}"
    for name, cls in inspect.getmembers(config_module, dataclasses.is_dataclass)
    for field in dataclasses.fields(cls)
    if field.name not in read
  ]
  assert unread == []


@pytest.mark.parametrize("module", ["vrt_jax", "vrt_jax.config", "vrt_jax.cli"])
def test_import_does_not_start_jax(module):
  code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

NO_COMMANDS = ("changelog", "concepts", "contributing", "differences", "files")
"""Pages of docs/ that name no command; those of the API reference name none either."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_name_commands_that_exist(document):
  text = document.read_text(encoding="utf-8")
  modules = set(re.findall(r"python -m ((?:vrt_jax|eval|scripts|converters)[\w.]*)", text))
  assert modules or document.parent.name == "reference" or document.stem in NO_COMMANDS
  missing = [m for m in sorted(modules) if importlib.util.find_spec(m) is None]
  recipes = set(re.findall(r"configs/\w+\.py", text))
  missing += [recipe for recipe in sorted(recipes) if not (ROOT / recipe).is_file()]
  assert missing == []
