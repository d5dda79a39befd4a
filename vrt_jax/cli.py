"""Shared by all commands: arguments through tyro, and errors as one line with exit status 1."""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

import vrt_jax

T = TypeVar("T")

EXTRAS = {"torch": "torch", "transformers": "test", "libtpu": "aot"}
"""Modules that only some commands need -> the extra that installs them."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = " │╭╮╰╯"
_RULE = "─-"


def parse(
  cls: type[T], args: Sequence[str], prog: str, doc: str | None = None, default: T | None = None
) -> T:
  """Command-line arguments as a dataclass, over the values of `default`.

  `--help` prints `doc`, which shows examples, and the options; `--version` the package's version.
  `--tyro-print-completion bash` (or zsh, tcsh) prints the completion of an installed command.

  Raises:
    ValueError: an option that does not exist, is missing or has a value of another type.
  """
  if "--version" in args:
    print(vrt_jax.__version__)
    raise SystemExit(0)
  if doc and not {"-h", "--help"}.isdisjoint(args):
    print(doc.strip() + "\n")
  given: dict[str, Any] = {} if default is None else {"default": default}
  if Path(sys.argv[0]).name.startswith("vrt-"):
    prog = Path(sys.argv[0]).name  # an installed command, which shells complete
  printed = io.StringIO()
  try:
    with contextlib.redirect_stderr(printed):
      parsed, unknown = tyro.cli(cls, prog=prog, args=list(args), return_unknown_args=True, **given)
  except SystemExit as stop:
    if not stop.code:  # --help
      raise
    raise ValueError(f"{_complaint(printed.getvalue())} (see --help)") from None
  if unknown:
    raise ValueError(f"unknown option {unknown[0]} (see --help)")
  return parsed


def split_at_dashes(args: Sequence[str]) -> tuple[list[str], list[str]]:
  """Words before and after "--": `--batch 4 -- --optim.remat linears`, fields of a recipe."""
  own = list(itertools.takewhile(lambda word: word != "--", args))
  return own, list(args[len(own) + 1 :])


def _complaint(box: str) -> str:
  """The first paragraph of the framed message that tyro prints; the frame may be plain ASCII.

  "╭─ Value error ─╮\\n│ no int: 'abc' │\\n│ ───────────── │\\n│ more │\\n╰─╯" -> "no int: 'abc'"
  """
  lines = [line.strip(_FRAME) for line in _COLOUR.sub("", box).splitlines()[1:]]
  paragraphs = itertools.groupby(lines, key=lambda line: bool(line.strip(_RULE)))
  return next((" ".join(group) for is_text, group in paragraphs if is_text), "bad arguments")


def run(main: Callable[[], object]) -> None:
  """Runs a command; what a user can mend is printed as one line, without a traceback."""
  try:
    main()
  except (ValueError, FloatingPointError, OSError) as error:
    _fail(" ".join(str(error).split()))
  except ModuleNotFoundError as error:
    if error.name not in EXTRAS:
      raise
    how = f"pip install -e '.[{EXTRAS[error.name]}]'"
    _fail(f"{error.name} is not installed: {how} in the checkout")
  except (RuntimeError, AssertionError) as error:
    if not _raised_in(error, "xla_bridge.py"):
      raise
    reason = (str(error).splitlines() or ["no such device"])[0]
    wanted = os.environ.get("JAX_PLATFORMS", "")
    _fail(f'no device for JAX_PLATFORMS="{wanted}": {reason}')
  except KeyboardInterrupt:
    print("interrupted; run the same command again to go on", file=sys.stderr)
    sys.exit(130)


def _fail(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)


def _raised_in(error: BaseException, file_name: str) -> bool:
  frame = error.__traceback__
  while frame and frame.tb_next:
    frame = frame.tb_next
  return frame is not None and Path(frame.tb_frame.f_code.co_filename).name == file_name
