"""tf.Example in protobuf wire format, without TensorFlow or protobuf.

Format: tensorflow/core/example/{example,feature}.proto; a map from name to a list of bytes, of
floats or of int64s.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard, TypeVar

FeatureValue = list[bytes] | list[int] | list[float]
V = TypeVar("V")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_HEAD_BYTES = 32  # of an entry: two tags and lengths (at most 22 bytes) and room for a name

ReadAt = Callable[[int, int], bytes]
"""(offset, number of bytes) -> the bytes that are there, fewer at the end."""


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(data):
      break
    byte = data[at]
    at += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value & (2**64 - 1), at
  raise ValueError("malformed tf.Example: bad varint")


def _read_fields(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
  """Yields (field number, wire type, number, bytes) of one protobuf message; a field has either."""
  at = 0
  while at < len(data):
    tag, at = _read_varint(data, at)
    number, wire = tag >> 3, tag & 7
    if wire == _VARINT:
      value, at = _read_varint(data, at)
      yield number, wire, value, data[:0]
      continue
    if wire == _BYTES:
      size, at = _read_varint(data, at)
    elif wire in (_FIXED32, _FIXED64):
      size = 4 if wire == _FIXED32 else 8
    else:
      raise ValueError(f"malformed tf.Example: wire type {wire}")
    if at + size > len(data):
      raise ValueError("malformed tf.Example: a field runs past the end of its message")
    yield number, wire, 0, data[at : at + size]
    at += size


def _signed(value: int) -> int:
  return value - 2**64 if value >= 2**63 else value


def _parse_list(kind: int, data: memoryview) -> FeatureValue:
  values: list = []
  for number, wire, value, item in _read_fields(data):
    if number != 1:
      continue
    if kind == _BYTES_LIST and wire == _BYTES:
      values.append(bytes(item))
    elif kind == _FLOAT_LIST and wire in (_BYTES, _FIXED32) and len(item) % 4 == 0:
      values += struct.unpack(f"<{len(item) // 4}f", item)
    elif kind == _INT64_LIST and wire == _VARINT:
      values.append(_signed(value))
    elif kind == _INT64_LIST and wire == _BYTES:
      at = 0
      while at < len(item):
        value, at = _read_varint(item, at)
        values.append(_signed(value))
    else:
      raise ValueError(f"malformed tf.Example: wire type {wire} in list kind {kind}")
  return values


def _parse_entry(data: memoryview) -> tuple[str, FeatureValue]:
  name = ""
  value: FeatureValue = []
  for number, wire, _, item in _read_fields(data):
    if wire != _BYTES:
      raise ValueError(f"malformed tf.Example: wire type {wire} in a feature")
    if number == 1:
      try:
        name = str(item, "utf-8")
      except UnicodeDecodeError:
        raise ValueError("malformed tf.Example: a feature name is not UTF-8") from None
    elif number == 2:
      for kind, inner_wire, _, inner in _read_fields(item):
        if kind not in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST) or inner_wire != _BYTES:
          raise ValueError(f"malformed tf.Example: feature {name!r} has list kind {kind}")
        value = _parse_list(kind, inner)
  return name, value


def parse_example(data: bytes) -> dict[str, FeatureValue]:
  """Parses a serialised tf.Example; raises ValueError where it is malformed."""
  features: dict[str, FeatureValue] = {}
  for number, wire, _, message in _read_fields(memoryview(data)):
    if number != 1:
      continue
    if wire != _BYTES:
      raise ValueError(f"malformed tf.Example: wire type {wire} at the top")
    for inner_number, inner_wire, _, entry in _read_fields(message):
      if inner_number == 1 and inner_wire == _BYTES:
        name, value = _parse_entry(entry)
        features[name] = value
  return features


def _head(read: ReadAt, at: int, num_bytes: int) -> tuple[int, int, memoryview]:
  """(tag, length, the bytes behind them) of a length-delimited field."""
  data = memoryview(read(at, num_bytes))
  tag, size = _read_varint(data, 0)
  length, size = _read_varint(data, size)
  return tag, length, data[size:]


def read_bytes_feature(read: ReadAt, num_bytes: int, name: str) -> bytes:
  """The single value of a bytes feature, without reading the other features' values.

  `read` gives pieces of a serialised tf.Example of `num_bytes` bytes. Raises ValueError where the
  feature is missing, has not one value, or what was read is malformed. `name` has at most 127
  bytes.
  """
  message = _BYTES | 1 << 3
  outer, length, rest = _head(read, 0, _HEAD_BYTES)
  at = min(num_bytes, _HEAD_BYTES) - len(rest)
  if outer != message or at + length != num_bytes:  # not as writers lay it out: read all of it
    value = parse_example(read(0, num_bytes)).get(name, [])
    return _one_bytes_value(value, name)
  wanted = name.encode()
  while at < num_bytes:
    window = min(num_bytes - at, _HEAD_BYTES + len(wanted))
    tag, length, rest = _head(read, at, window)
    at += window - len(rest)
    if tag != message or at + length > num_bytes:
      raise ValueError("malformed tf.Example: no map entry")
    other_first = rest[:1] != bytes([message])  # the value stands before the name
    if other_first or rest[1 : 2 + len(wanted)] == bytes([len(wanted)]) + wanted:
      found, value = _parse_entry(memoryview(read(at, length)))
      if found == name:
        return _one_bytes_value(value, name)
    at += length
  return _one_bytes_value([], name)


def _one_bytes_value(values: FeatureValue, name: str) -> bytes:
  if len(values) != 1 or not isinstance(values[0], bytes):
    raise ValueError(f"missing feature: {name} is not there once as bytes")
  return values[0]


def _varint(value: int) -> bytes:
  out = bytearray()
  value &= 2**64 - 1
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  out.append(value)
  return bytes(out)


def _field(number: int, data: bytes) -> bytes:
  return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _all_are(values: Sequence, kind: type[V]) -> TypeGuard[Sequence[V]]:
  return all(isinstance(value, kind) for value in values)


def serialize_example(features: dict[str, FeatureValue]) -> bytes:
  """Serialises features to a tf.Example; an empty list becomes a feature without a value."""
  entries = []
  for name, values in features.items():
    if not values:
      feature = b""
    elif _all_are(values, bytes):
      feature = _field(_BYTES_LIST, b"".join(_field(1, v) for v in values))
    elif _all_are(values, int):
      feature = _field(_INT64_LIST, _field(1, b"".join(_varint(v) for v in values)))
    elif _all_are(values, float):
      feature = _field(_FLOAT_LIST, _field(1, struct.pack(f"<{len(values)}f", *values)))
    else:
      raise ValueError(f"feature {name!r} mixes types; use a list of bytes, of int or of float")
    entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
  return _field(1, b"".join(entries))
