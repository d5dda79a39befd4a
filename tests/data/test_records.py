import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from vrt_jax.data import records, tfrecord
from vrt_jax.data.records import TFRecordSource, TFRecordWriter


def _write(path, items):
  with TFRecordWriter(path) as writer:
    for item in items:
      writer.write(item)
  return str(path)


def test_example_round_trip():
  features = {
    "b": [b"", b"\x00\xff"],
    "i": [0, 1, -1, 2**63 - 1, -(2**63), 300],
    "f": [0.5, -2.0],
    "empty": [],
  }
  assert records.parse_example(records.serialize_example(features)) == features


def test_example_known_bytes():
  # Example{features{feature{key: "a" value{int64_list{value: 5}}}}}
  data = bytes.fromhex("0a0c 0a0a 0a0161 1205 1a03 0a0105".replace(" ", ""))
  assert records.parse_example(data) == {"a": [5]}
  assert records.serialize_example({"a": [5]}) == data
  unpacked = bytes.fromhex("0a0b 0a09 0a0161 1204 1a02 0805".replace(" ", ""))
  assert records.parse_example(unpacked) == {"a": [5]}


@pytest.mark.parametrize("data", [b"\x0a\x05\x00", b"\x0a", b"\xff" * 12, b"\x0b\x00", b"\x08\x01"])
def test_malformed_example(data):
  with pytest.raises(ValueError, match=r"malformed tf\.Example"):
    records.parse_example(data)


def test_mixed_types():
  with pytest.raises(ValueError, match="mixes types"):
    records.serialize_example({"a": [b"x", 1]})


def test_masked_crc_known_value():
  # crc32c of 32 zero bytes is 8a9136aa (RFC 3720, B.4)
  crc = 0x8A9136AA
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  assert tfrecord._masked_crc(bytes(32)) == masked


def test_source(tmp_path):
  _write(tmp_path / "b.tfrecord", [b"3"])
  _write(tmp_path / "a.tfrecord", [b"0", b"", b"2" * 300])
  source = TFRecordSource(str(tmp_path / "*.tfrecord"))
  expected = [b"0", b"", b"2" * 300, b"3"]
  assert [source[i] for i in range(len(source))] == expected
  copy = pickle.loads(pickle.dumps(source))
  with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(copy.__getitem__, [0, 1, 2, 3] * 20)) == expected * 20
  with pytest.raises(IndexError):
    source[4]
  paths = [str(tmp_path / "b.tfrecord"), str(tmp_path / "a.tfrecord")]
  assert TFRecordSource(paths)[0] == b"3"


def test_source_errors(tmp_path):
  with pytest.raises(ValueError, match="no file matches"):
    TFRecordSource(str(tmp_path / "x*"))
  (tmp_path / "empty").touch()
  with pytest.raises(ValueError, match="empty TFRecord file"):
    TFRecordSource(str(tmp_path / "empty"))
  path = _write(tmp_path / "a", [b"first", b"second"])
  with open(path, "rb") as file:
    good = file.read()
  start = 12 + 5 + 4

  def broken(data):
    with open(path, "wb") as file:
      file.write(data)
    return TFRecordSource(path)

  for cut in (len(good) - 1, start + 3):
    with pytest.raises(ValueError, match=rf"truncated record in .* at byte {start}"):
      broken(good[:cut])
  with pytest.raises(ValueError, match=r"corrupt length checksum in .* at byte 0"):
    broken(struct.pack("<Q", 6) + good[8:])
  source = broken(good[:12] + b"F" + good[13:])
  assert source[1] == b"second"
  with pytest.raises(ValueError, match=r"corrupt data checksum in .* at byte 0"):
    source[0]


def test_writer_is_atomic(tmp_path):
  path = _write(tmp_path / "a", [b"old"])
  with pytest.raises(RuntimeError), TFRecordWriter(path) as writer:
    writer.write(b"new")
    raise RuntimeError
  assert os.listdir(tmp_path) == ["a"]
  assert TFRecordSource(path)[0] == b"old"


def test_records_round_trip():
  train = records.TrainRecord("k", b"jpeg", {"a": ["ü"]})
  assert records.parse_train(records.serialize_train(train)) == train
  rle = {"size": [1, 1], "counts": "0"}
  evaluation = records.EvalRecord(
    key="k",
    image=b"jpeg",
    question="Which?",
    objects={"7": {"mask": rle, "caption": "cup", "original_id": "<obj7>"}},
    reasoning_ids=["7"],
    answer_ids=[],
    class_ids=["#loc", "#func"],
    confidence=5,
    reference_answer="This one.",
  )
  assert records.parse_eval(records.serialize_eval(evaluation)) == evaluation


def test_missing_and_wrong_features():
  with pytest.raises(ValueError, match="missing feature: image"):
    records.parse_train(records.serialize_example({"key": [b"k"], "json": [b"{}"]}))
  features = {"key": [b"k"], "image": [b""], "json": [b"{"]}
  with pytest.raises(ValueError, match="json is not JSON"):
    records.parse_train(records.serialize_example(features))
  with pytest.raises(ValueError, match="image does not hold bytes"):
    records.parse_train(records.serialize_example(features | {"image": [1]}))


def test_photos(shared_data):
  train = list(records.read_train_records(str(shared_data / "photos" / "photos_train*")))
  evaluation = list(records.read_eval_records(str(shared_data / "photos" / "photos_eval*")))
  assert [r.key for r in train] == [r.key for r in evaluation] and len(train) == 7
  for sample, labelled in zip(train, evaluation, strict=True):
    assert sample.annotation["generated_ver_data"]["candidates"][0]["question"] == labelled.question
    assert set(labelled.answer_ids) <= set(labelled.reasoning_ids) <= set(labelled.objects)
    assert labelled.reference_reasoning is None
    assert sample.image == labelled.image and sample.image[:2] == b"\xff\xd8"
