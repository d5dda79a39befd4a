"""Random input: it is used or refused by one ValueError, and never anything else."""

import dataclasses
import http.client
import json
import math
import random
from collections.abc import Iterator
from typing import get_type_hints

import pytest

from tests import tiny
from tests.test_serve import LeftHalf, question, running
from vrt_jax.config import ImageConfig, TrainConfig
from vrt_jax.data.checks import check_eval_record, check_train_record
from vrt_jax.data.records import parse_eval, parse_train, serialize_eval, serialize_train
from vrt_jax.data.tfrecord import TFRecordSource, TFRecordWriter
from vrt_jax.train.checks import RANGES, check_buckets_hold, check_grpo, check_numbers

JUNK = [
  None,
  True,
  -1,
  0,
  2**70,
  math.nan,
  1e300,
  "",
  "\x00",
  "<obj1>",
  "[SEG]",
  [],
  [[]],
  {},
]


def refused(act, *args) -> str | None:
  """The message where it is refused; it has one line."""
  try:
    act(*args)
  except ValueError as error:
    assert str(error) and len(str(error)) < 2000
    return str(error)
  return None


def damaged(data: bytes, rng: random.Random) -> bytes:
  """Some bytes changed, cut out or doubled."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([1, 1, 2, 8, 64]))
    kind = rng.randrange(3)
    if kind == 0:
      data[start:stop] = rng.randbytes(stop - start)
    elif kind == 1 and stop - start < len(data):
      del data[start:stop]
    else:
      data[start:start] = data[start:stop]
  return bytes(data)


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
  """The paths of all values inside nested lists and dicts."""
  if path:
    yield path
  if isinstance(value, dict | list):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
      yield from places(value[key], (*path, key))


def with_junk(value: dict, rng: random.Random) -> dict:
  """One value inside replaced or taken out."""
  value = json.loads(json.dumps(value))
  *path, last = rng.choice(list(places(value)))
  holder = value
  for key in path:
    holder = holder[key]
  if rng.random() < 0.3:
    del holder[last]
  else:
    holder[last] = rng.choice(JUNK)
  return value


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_damaged_records(kind):
  rng = random.Random(0)
  if kind == "train":
    whole, parse, check = serialize_train(tiny.train_record(0)), parse_train, check_train_record
  else:
    whole, parse, check = serialize_eval(tiny.eval_record(0)), parse_eval, check_eval_record
  found = [refused(lambda d: check(parse(d), "full"), damaged(whole, rng)) for _ in range(1500)]
  assert sum(message is not None for message in found) > 100
  assert refused(lambda d: check(parse(d), "full"), whole) is None


def test_annotations_with_junk():
  rng, record = random.Random(1), tiny.train_record(0)
  messages = [
    refused(
      check_train_record, dataclasses.replace(record, annotation=with_junk(record.annotation, rng))
    )
    for _ in range(2000)
  ]
  assert None in messages  # what is not read may be anything
  assert len({message.partition(":")[0] for message in messages if message}) > 3


def test_evaluation_objects_with_junk():
  rng, record = random.Random(2), tiny.eval_record(0)
  features = {"objects": record.objects}

  def use(objects: object) -> None:
    data = serialize_eval(dataclasses.replace(record, objects=objects))
    check_eval_record(parse_eval(data))

  messages = [refused(use, with_junk(features, rng).get("objects")) for _ in range(1000)]
  assert None in messages  # a caption may be any text
  assert len({message.partition(":")[0] for message in messages if message}) > 2
  assert not any("malformed tf.Example" in message for message in messages if message)


def test_damaged_files(tmp_path):
  rng, path = random.Random(3), tmp_path / "records.tfrecord"
  with TFRecordWriter(path) as writer:
    for i in range(3):
      writer.write(serialize_train(tiny.train_record(i)))
  whole = path.read_bytes()

  def read(data: bytes) -> None:
    for file in tmp_path.iterdir():
      file.unlink()
    path.write_bytes(data)
    source = TFRecordSource(str(path))
    for i in range(len(source)):
      source[i]

  assert refused(read, whole) is None
  assert all(refused(read, damaged(whole, rng)) for _ in range(300))


def numbers(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
  """Dotted name and type of every number in a recipe's settings."""
  for name, hint in get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield from numbers(hint, f"{prefix}{name}.")
    elif hint in (int, float):
      yield f"{prefix}{name}", hint


def changed(config: object, name: str, value: object) -> object:
  head, _, rest = name.partition(".")
  value = changed(getattr(config, head), rest, value) if rest else value
  return dataclasses.replace(config, **{head: value})


def check(config: TrainConfig) -> None:
  check_numbers(config)
  check_buckets_hold(config, ImageConfig())
  check_grpo(dataclasses.replace(config, algorithm="grpo"))


OF_THE_MODEL = ("model.vision.", "model.text.", "model.sam2.", "image.", "mesh.")
"""The model directory's sizes and the mesh are checked where they are used."""
NUMBERS = [(n, t) for n, t in numbers(TrainConfig) if not n.startswith(OF_THE_MODEL)]


@pytest.mark.parametrize(("name", "kind"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_settings_out_of_bounds_are_named(name, kind):
  assert refused(check, TrainConfig()) is None
  for value in (-(2**70),) if kind is int else (math.nan, math.inf, -math.inf, -1e300):
    message = refused(check, changed(TrainConfig(), name, value))
    assert message is not None and message.startswith(f"{name} is ")
  for value in [*RANGES[name], 0, 1, 2**40]:
    if value != math.inf:
      message = refused(check, changed(TrainConfig(), name, kind(value)))
      assert message is None or name.rpartition(".")[2] in message


@pytest.mark.parametrize("buckets", [(), ((0, 0),), ((-1, 144),), ((288, -4),), ((31, 0),)])
def test_odd_buckets(buckets):
  for name in ("data.buckets", "eval.prompt_buckets"):
    message = refused(check, changed(TrainConfig(), name, buckets))
    assert message is not None and message.startswith(name)


def test_requests_to_the_page():
  rng = random.Random(4)
  whole = json.loads(question())
  with running(LeftHalf()) as port:
    for i in range(150):
      body = json.dumps(with_junk(whole, rng)).encode() if i % 2 else damaged(question(), rng)
      connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
      connection.request("POST", "/predict", body)
      response = connection.getresponse()
      found = json.loads(response.read())
      connection.close()
      assert response.status in (200, 400, 413)
      if response.status != 200:
        assert found["error"] and "\n" not in found["error"] and "Traceback" not in found["error"]
