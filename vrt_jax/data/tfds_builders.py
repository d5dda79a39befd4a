"""TFDS builders: VRT TFRecord files -> ArrayRecord with random access, without TensorFlow.

    builder = build(Vrt80k, "VRT-80k/*.tfrecord", "data")
    builder.as_data_source("train")[7]  # a dict of features, the picture as uint8 [Y, X, 3]

Records keep the order of the files, pictures the bytes they came in. `sources.train_source` and
`eval_source` give the records themselves; `scripts.prepare_data` writes large sets.
"""

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vrt_jax.data.records import EvalRecord, TrainRecord, read_eval_records, read_train_records
from vrt_jax.data.sources import EVAL_SPLIT, TRAIN_SPLIT

FILE_FORMAT = "array_record"

Features = dict[str, Any]


def encode_train(record: TrainRecord) -> Features:
  """A record as the features of Vrt80k."""
  return {
    "key": record.key,
    "image": io.BytesIO(record.image),
    "json": json.dumps(record.annotation),
  }


def encode_eval(record: EvalRecord) -> Features:
  """A record as the features of VrtEval; texts that are not there are empty."""
  return {
    "key": record.key,
    "image": io.BytesIO(record.image),
    "question": record.question,
    "objects_info_json": json.dumps(record.objects),
    "human_labeled_r_objs": [int(i) for i in record.reasoning_ids],
    "human_labeled_a_objs": [int(i) for i in record.answer_ids],
    "human_confidence": record.confidence,
    "class_ids": record.class_ids,
    "human_reasoning": record.reference_reasoning or "",
    "human_answer_caption": record.reference_answer or "",
  }


class Vrt80k(tfds.core.GeneratorBasedBuilder):
  """VRT-80k, split "train": key, image, and the annotation as JSON text."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # TFDS 4.9.10 looks for it with importlib_resources, which it does not install

  def __init__(self, *, pattern: str = "", **kwargs: Any):
    """`pattern` names the TFRecord files; only building needs it. `kwargs` are those of TFDS."""
    self._pattern = pattern
    super().__init__(file_format=FILE_FORMAT, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "key": tfds.features.Text(),
      "image": tfds.features.Image(shape=(None, None, 3)),
      "json": tfds.features.Text(),
    }
    return _dataset_info(self, features)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    return {TRAIN_SPLIT: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, Features]]:
    for index, record in enumerate(read_train_records(self._pattern)):
      yield index, encode_train(record)


class VrtEval(tfds.core.GeneratorBasedBuilder):
  """VRT-Eval, split "test": the fields of an EvalRecord under their names in the record layout."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # TFDS 4.9.10 looks for it with importlib_resources, which it does not install

  def __init__(self, *, pattern: str = "", **kwargs: Any):
    """`pattern` names the TFRecord files; only building needs it. `kwargs` are those of TFDS."""
    self._pattern = pattern
    super().__init__(file_format=FILE_FORMAT, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text, ids = tfds.features.Text, tfds.features.Sequence
    features = {
      "key": text(),
      "image": tfds.features.Image(shape=(None, None, 3)),
      "question": text(),
      "objects_info_json": text(),
      "human_labeled_r_objs": ids(np.int64),
      "human_labeled_a_objs": ids(np.int64),
      "human_confidence": tfds.features.Scalar(np.int64),
      "class_ids": ids(text()),
      "human_reasoning": text(),
      "human_answer_caption": text(),
    }
    return _dataset_info(self, features)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    return {EVAL_SPLIT: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, Features]]:
    for index, record in enumerate(read_eval_records(self._pattern)):
      yield index, encode_eval(record)


def _dataset_info(
  builder: tfds.core.GeneratorBasedBuilder, features: Features
) -> tfds.core.DatasetInfo:
  return tfds.core.DatasetInfo(
    builder=builder,
    description="Visual reasoning traces with masks (arXiv 2512.05091).",
    features=tfds.features.FeaturesDict(features),
    disable_shuffling=True,
  )


def build(
  builder_class: type[Vrt80k] | type[VrtEval], pattern: str, data_dir: str | os.PathLike
) -> Vrt80k | VrtEval:
  """Writes ArrayRecord files below `data_dir`; a data set that is there already is left alone.

  Pictures are stored as the bytes they came in.

  Raises:
    ValueError: no file matches, or a record is broken.
  """
  builder = builder_class(pattern=pattern, data_dir=os.fspath(data_dir))
  builder.download_and_prepare()
  return builder
