"""TFDS: ArrayRecord files from our records and back, without TensorFlow."""

import sys

import numpy as np
import pytest

from vrt_jax.data import sources, tfds_builders
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import read_eval_records, read_train_records
from vrt_jax.data.shapes import write_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("shapes")
  return write_shapes(folder, 4, 3, seed=5, workers=1, progress=False)


def test_train_records_come_back_in_order(shapes, tmp_path):
  builder = tfds_builders.build(tfds_builders.Vrt80k, shapes[0], tmp_path)
  expected = list(read_train_records(shapes[0]))
  source = sources.train_source(tmp_path)
  assert len(source) == 4
  assert [source[i] for i in (3, 0, 2, 1)] == [expected[i] for i in (3, 0, 2, 1)]
  decoded = builder.as_data_source("train")[2]["image"]
  assert np.array_equal(decoded, np.asarray(decode_image(expected[2].image)))
  assert list(tmp_path.rglob("*.array_record*"))
  assert "tensorflow" not in sys.modules


def test_eval_records_come_back_in_order(shapes, tmp_path):
  tfds_builders.build(tfds_builders.VrtEval, shapes[1], tmp_path)
  assert list(sources.eval_source(tmp_path)) == list(read_eval_records(shapes[1]))


def test_a_second_build_keeps_the_first(shapes, tmp_path):
  tfds_builders.build(tfds_builders.VrtEval, shapes[1], tmp_path)
  tfds_builders.build(tfds_builders.VrtEval, "no such file", tmp_path)
  assert len(sources.eval_source(tmp_path)) == 3


def test_what_is_missing_is_said(tmp_path):
  with pytest.raises(ValueError, match="holds no vrt80k data set"):
    sources.train_source(tmp_path)
  with pytest.raises(ValueError, match="no file matches"):
    tfds_builders.build(tfds_builders.Vrt80k, str(tmp_path / "*.tfrecord"), tmp_path)
