"""Rule tables read in both directions, strictly; the reference's names one by one."""

import ast
import csv
from dataclasses import replace

import numpy as np
import pytest

from converters.conversion import expected_sa2va
from converters.export import patch_kernel, rename
from converters.rules import Ignored, Part, Rule, RuleTable, assign, raise_all
from converters.sa2va_rules import sa2va_table
from converters.streams import StreamedArray
from vrt_jax.sizes import sa2va_sizes

TABLE = RuleTable(
  (
    Rule("enc.{layer}.{rest}", "encoder.{rest}"),
    Rule("point", "points.{row}.weight"),
    Rule("head.weight", "head", "conv1x1"),
  ),
  (Ignored(r"old\..+", "not used"),),
)
TARGETS = {
  "encoder.w": (2, 3, 4),
  "points.0.weight": (1, 5),
  "points.1.weight": (1, 5),
  "head": (2, 3),
}
SOURCES = {"enc.0.w": (3, 4), "enc.1.w": (3, 4), "point": (2, 5), "head.weight": (2, 3, 1, 1)}


def test_import_and_export_agree():
  parts, problems = assign(TABLE, SOURCES | {"old.w": (1,)}, TARGETS)
  assert not problems
  assert parts == {
    "encoder.w": [Part("enc.0.w", 0), Part("enc.1.w", 1)],
    "points.0.weight": [Part("point", row=0)],
    "points.1.weight": [Part("point", row=1)],
    "head": [Part("head.weight")],
  }
  for target, found in parts.items():
    assert TABLE.parts(target, TARGETS[target][0])[1] == found


@pytest.mark.parametrize(
  ("change", "problem"),
  [
    ({"enc.0.w": None}, "enc.0.w: missing"),
    ({"enc.2.w": (3, 4)}, "enc.2.w: the model has 2 layers"),
    ({"enc.0.b": (3,)}, "enc.0.b: the model has no encoder.b"),
    ({"tail": (1,)}, "tail: unknown key"),
    ({"enc.1.w": (4, 3)}, "enc.1.w: shape [4, 3], the model's is [3, 4]"),
    ({"point": (2, 6)}, "point: shape [1, 6], the model's is [1, 5]"),
    ({"point": (3, 5)}, "point: the model has no points.2.weight"),
    ({"head.weight": (2, 3, 2, 1)}, "head.weight: (2, 3, 2, 1) is no 1x1 convolution"),
  ],
)
def test_every_difference_is_a_problem(change, problem):
  sources = {k: v for k, v in (SOURCES | change).items() if v is not None}
  assert problem in assign(TABLE, sources, TARGETS)[1]


def test_two_rules_for_one_key_and_two_keys_for_one_parameter():
  doubled = RuleTable((Rule("{rest}", "{rest}"), Rule("a", "b")))
  assert assign(doubled, {"a": (1,)}, {})[1] == ["a: 2 rules match"]
  both = RuleTable((Rule("a", "x"), Rule("b", "x")))
  with pytest.raises(ValueError, match="parameter x: 2 rules match"):
    assign(both, {"a": (1,), "b": (1,)}, {"x": (1,)})


def test_problems_become_one_message():
  raise_all([])
  with pytest.raises(ValueError, match=r"^2 problems: a; b$"):
    raise_all(["a", "b"])


def test_the_names_of_the_4b_export(shared_data):
  """All 1618 keys and shapes: 1461 are exactly what our parameters become, 157 are for video."""
  with (shared_data / "keys_4b.tsv").open() as file:
    rows = [row for row in csv.reader(file, delimiter="\t") if row[1].startswith("[")]
  theirs = {key: tuple(ast.literal_eval(shape)) for key, shape in rows}
  table = sa2va_table(tied=False)
  model = sa2va_sizes("4B")
  model = replace(model, text=replace(model.text, tie_embeddings=False))
  shapes = expected_sa2va(model)[0]
  unread = {n: StreamedArray(s, np.dtype("float32"), 1, None) for n, s in shapes.items()}
  ours = {k: a.shape for k, a in rename(table, unread, patch_kernel(model)).items()}
  ignored = {key for key in theirs if table.ignored(key)}
  assert (len(theirs), len(ignored)) == (1618, 157)
  assert {key: shape for key, shape in theirs.items() if key not in ignored} == ours
  parts, problems = assign(table, theirs, shapes)
  assert not problems and parts.keys() == shapes.keys()
  assert sum(int(np.prod(shape)) for shape in theirs.values()) == 5_057_072_690
