"""Shared by all commands: arguments through tyro, and errors as one line with exit status 1."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
  """Command-line arguments as a dataclass, over the values of `default`.

  Raises:
    ValueError: an option that does not exist.
  """
  given = {} if default is None else {"default": default}
  parsed, unknown = tyro.cli(
    cls, prog=prog, args=list(args), return_unknown_args=True, **given
  )
  if unknown:
    raise ValueError(f"unknown option {unknown[0]} (see --help)")
  return parsed


def run(main: Callable[[], None]) -> None:
  """Runs a command; what a user can mend is printed as one line, without a traceback."""
  try:
    main()
  except (ValueError, FloatingPointError, OSError) as error:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print("interrupted; run the same command again to go on", file=sys.stderr)
    sys.exit(130)
