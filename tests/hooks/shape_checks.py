"""Shapes and dtypes that the package's signatures state, checked wherever a test calls them.

`--jaxtyping-packages` in pyproject.toml puts `checked` around every function of `vrt_jax`. Arrays
of JAX and numpy count alike, and so do tracers; all other types are mypy's concern.
"""

import functools
import operator
import types
import typing
from collections.abc import Callable

import jaxtyping
from beartype import beartype


def shapes_of(annotation: object) -> object:
  """What is checked of an annotation: the shapes and dtypes in it."""
  if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
    return annotation.dtype[typing.Any, annotation.dim_str]
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (types.UnionType, typing.Union):
    kept = [part if part is type(None) else shapes_of(part) for part in parts]
    return typing.Any if typing.Any in kept else functools.reduce(operator.or_, kept)
  if origin is tuple:
    return tuple[tuple(part if part is ... else shapes_of(part) for part in parts)]
  return typing.Any


def checked(function: Callable) -> Callable:
  """The function, which raises where an argument or result has not the shape that it states.

  Constructors are left out: JAX rebuilds containers of arrays with what stands for arrays.
  """
  kept = {name: shapes_of(stated) for name, stated in function.__annotations__.items()}
  if function.__name__ == "__init__" or all(stated is typing.Any for stated in kept.values()):
    return function
  copy = types.FunctionType(
    function.__code__,
    function.__globals__,
    function.__name__,
    function.__defaults__,
    function.__closure__,
  )
  for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__"):
    setattr(copy, name, getattr(function, name))
  copy.__annotations__ = kept
  return beartype(copy)
