"""The two record layouts of VRT, stored as tf.Example records in TFRecord files.

VRT-80k (training) and VRT-Eval, as published with R-Sa2VA (arXiv 2512.05091).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vrt_jax.data.tf_example import FeatureValue, parse_example, serialize_example
from vrt_jax.data.tfrecord import TFRecordSource, TFRecordWriter

__all__ = [
  "EvalRecord",
  "TFRecordSource",
  "TFRecordWriter",
  "TrainRecord",
  "parse_eval",
  "parse_example",
  "parse_train",
  "read_eval_records",
  "read_train_records",
  "serialize_eval",
  "serialize_example",
  "serialize_train",
]


@dataclass(frozen=True)
class TrainRecord:
  """A sample of the VRT-80k layout."""

  key: str
  image: bytes
  """An encoded image (JPEG)."""
  annotation: dict
  """The parsed `json` feature."""


@dataclass(frozen=True)
class EvalRecord:
  """A sample of the VRT-Eval layout. Object ids are decimal strings."""

  key: str
  image: bytes
  """An encoded image (JPEG)."""
  question: str
  objects: dict[str, dict]
  """id -> {"mask": COCO RLE, "caption": str, "original_id": str}."""
  reasoning_ids: list[str]
  """Evidence objects as labelled by people."""
  answer_ids: list[str]
  class_ids: list[str]
  """Question families such as "#loc"."""
  confidence: int
  reference_reasoning: str | None = None
  reference_answer: str | None = None


def _feature(features: dict[str, FeatureValue], name: str, kind: type) -> list:
  if name not in features:
    raise ValueError(f"missing feature: {name} (the record has {', '.join(sorted(features))})")
  values = features[name]
  if not all(isinstance(value, kind) for value in values):
    raise ValueError(f"bad feature: {name} does not hold {kind.__name__} values")
  return values


def _single(features: dict[str, FeatureValue], name: str, kind: type) -> Any:
  values = _feature(features, name, kind)
  if len(values) != 1:
    raise ValueError(f"bad feature: {name} holds {len(values)} values instead of 1")
  return values[0]


def _text(features: dict[str, FeatureValue], name: str) -> str:
  return _decoded(_single(features, name, bytes), name)


def _decoded(value: bytes, name: str) -> str:
  try:
    return value.decode()
  except UnicodeDecodeError:
    raise ValueError(f"bad feature: {name} is not UTF-8") from None


def _json(features: dict[str, FeatureValue], name: str) -> dict:
  try:
    value = json.loads(_text(features, name))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"bad feature: {name} is not JSON: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"bad feature: {name} is not a JSON object")
  return value


def parse_train(data: bytes) -> TrainRecord:
  """Parses a record of the VRT-80k layout.

  Raises ValueError ("missing feature: ..", "bad feature: ..", "malformed tf.Example: ..").
  """
  features = parse_example(data)
  return TrainRecord(
    _text(features, "key"), _single(features, "image", bytes), _json(features, "json")
  )


def serialize_train(record: TrainRecord) -> bytes:
  """The inverse of `parse_train`."""
  return serialize_example(
    {
      "key": [record.key.encode()],
      "image": [record.image],
      "json": [json.dumps(record.annotation).encode()],
    }
  )


def parse_eval(data: bytes) -> EvalRecord:
  """Parses a record of the VRT-Eval layout; raises ValueError as `parse_train` does.

  Reference: projects/vrt_sa2va/evaluation/packed_vrt_eval_dataloader.py, PackedVRTEvalDataset.
  """
  features = parse_example(data)
  objects = {
    key: _eval_object(key, info) for key, info in _json(features, "objects_info_json").items()
  }
  optional = {
    name: _text(features, name) if features.get(name) else None
    for name in ("human_reasoning", "human_answer_caption")
  }
  return EvalRecord(
    key=_text(features, "key"),
    image=_single(features, "image", bytes),
    question=_text(features, "question"),
    objects=objects,
    reasoning_ids=[str(i) for i in _feature(features, "human_labeled_r_objs", int)],
    answer_ids=[str(i) for i in _feature(features, "human_labeled_a_objs", int)],
    class_ids=[_decoded(name, "class_ids") for name in _feature(features, "class_ids", bytes)],
    confidence=_single(features, "human_confidence", int),
    reference_reasoning=optional["human_reasoning"] or None,
    reference_answer=optional["human_answer_caption"] or None,
  )


def _eval_object(key: str, info: object) -> dict:
  if not isinstance(info, dict) or "mask" not in info:
    raise ValueError(f"bad feature: objects_info_json has no mask for object {key}")
  return {
    "mask": info["mask"],
    "caption": info.get("caption", ""),
    "original_id": info.get("original_id", ""),
  }


def serialize_eval(record: EvalRecord) -> bytes:
  """The inverse of `parse_eval`."""
  features: dict[str, FeatureValue] = {
    "key": [record.key.encode()],
    "image": [record.image],
    "question": [record.question.encode()],
    "objects_info_json": [json.dumps(record.objects).encode()],
    "human_labeled_r_objs": [int(i) for i in record.reasoning_ids],
    "human_labeled_a_objs": [int(i) for i in record.answer_ids],
    "human_confidence": [record.confidence],
    "class_ids": [name.encode() for name in record.class_ids],
  }
  if record.reference_reasoning is not None:
    features["human_reasoning"] = [record.reference_reasoning.encode()]
  if record.reference_answer is not None:
    features["human_answer_caption"] = [record.reference_answer.encode()]
  return serialize_example(features)


def read_train_records(patterns: str | Sequence[str]) -> Iterator[TrainRecord]:
  """Reads the VRT-80k records of the matching files in order."""
  source = TFRecordSource(patterns)
  for index in range(len(source)):
    yield parse_train(source[index])


def read_eval_records(patterns: str | Sequence[str]) -> Iterator[EvalRecord]:
  """Reads the VRT-Eval records of the matching files in order."""
  source = TFRecordSource(patterns)
  for index in range(len(source)):
    yield parse_eval(source[index])
