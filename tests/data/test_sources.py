"""Sources: the same records from TFRecord files and from a prepared set, and their keys."""

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vrt_jax.data import sources, tfds_builders
from vrt_jax.data.records import TFRecordWriter, TrainRecord, serialize_train
from vrt_jax.data.tf_example import read_bytes_feature, serialize_example

NUM_PHOTOS = 7


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("prepared")
  tfds_builders.build(tfds_builders.Vrt80k, str(photos / "photos_train.tfrecord"), folder)
  tfds_builders.build(tfds_builders.VrtEval, str(photos / "photos_eval.tfrecord"), folder)
  return folder


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_both_stores_hold_the_same_records(photos, prepared, kind):
  open_source = {"train": sources.train_source, "eval": sources.eval_source}[kind]
  files = open_source(str(photos / f"photos_{kind}.tfrecord"))
  folder = open_source(str(prepared))
  assert len(files) == len(folder) == NUM_PHOTOS
  assert [folder[i] for i in range(NUM_PHOTOS)] == [files[i] for i in range(NUM_PHOTOS)]
  assert files.keys() == folder.keys() == [files[i].key for i in range(NUM_PHOTOS)]
  with pytest.raises(IndexError, match="record 7 of 7"):
    folder[NUM_PHOTOS]
  with pytest.raises(IndexError, match="record -1 of 7"):
    files[-1]


@pytest.mark.parametrize("where", ["", "vrt80k", "vrt80k/1.0.0"])
def test_any_folder_of_a_data_set_leads_to_it(prepared, where):
  assert len(sources.train_source(prepared / where)) == NUM_PHOTOS


def test_the_newest_version_is_taken(prepared, tmp_path):
  folder = tmp_path / "vrt80k"
  for version in ("1.0.0", "1.10.0", "1.9.0"):
    shutil.copytree(prepared / "vrt80k" / "1.0.0", folder / version)
  shutil.copytree(folder / "1.0.0", folder / "2.0.0.partial")
  assert sources.prepared_folder(tmp_path, "vrt80k") == folder / "1.10.0"


@pytest.mark.parametrize("store", ["files", "folder"])
def test_sources_are_pickled_and_read_from_threads(photos, prepared, store):
  data = {"files": str(photos / "photos_train.tfrecord"), "folder": str(prepared)}[store]
  source = sources.train_source(data)
  expected = [source[i] for i in range(NUM_PHOTOS)]
  copy = pickle.loads(pickle.dumps(source))
  with ThreadPoolExecutor(4) as pool:
    read = list(pool.map(copy.__getitem__, [*range(NUM_PHOTOS)] * 4))
  assert read == expected * 4


def write(path: Path, *examples: bytes) -> str:
  with TFRecordWriter(path) as writer:
    for example in examples:
      writer.write(example)
  return str(path)


def record(key: str) -> bytes:
  return serialize_train(TrainRecord(key, b"\xff\xd8" * 50_000, {"text": "x" * 10_000}))


def test_keys_read_neither_pictures_nor_annotations(tmp_path, monkeypatch):
  features = {"json": [b"{" * 70_000], "image": [bytes(200_000)], "key": [b"last"]}
  examples = [record("first"), serialize_example(features), record("ä"), b"\x0a\x05junk!"]
  source = sources.train_source(write(tmp_path / "a", *examples))
  read_bytes = 0
  pread = os.pread

  def counted(file: int, count: int, offset: int) -> bytes:
    nonlocal read_bytes
    data = pread(file, count, offset)
    read_bytes += len(data)
    return data

  monkeypatch.setattr(os, "pread", counted)
  assert source.keys() == ["first", "last", "ä", ""]
  assert read_bytes < 1000


@pytest.mark.parametrize(
  "features",
  [{}, {"kez": [b"x"]}, {"key": [1]}, {"key": [b"a", b"b"]}, {"key": []}, {"": [], "k": [b"x"]}],
)
def test_a_missing_feature_is_said(features):
  data = serialize_example(features)
  with pytest.raises(ValueError, match="missing feature: key"):
    read_bytes_feature(lambda at, count: data[at : at + count], len(data), "key")


def test_a_value_before_its_name_is_found():
  # Example{features{feature{value: bytes_list{value: "v"}, key: "key"}}}: fields in reverse
  entry = b"\x12\x05\x0a\x03\x0a\x01v" + b"\x0a\x03key"
  data = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
  assert read_bytes_feature(lambda at, count: data[at : at + count], len(data), "key") == b"v"


def test_damaged_records_raise_one_by_one(tmp_path):
  path = write(tmp_path / "a", record("a"), b"\x0a\x05\x00", record("c"))
  data = bytearray(Path(path).read_bytes())
  data[-100] ^= 1
  Path(path).write_bytes(data)
  source = sources.train_source(path)
  assert source[0].key == "a"
  with pytest.raises(ValueError, match=r"^malformed tf\.Example: "):
    source[1]
  with pytest.raises(ValueError, match=rf"^corrupt record: .* in {path} at byte "):
    source[2]
  assert source.keys() == ["a", "", "c"]


def test_a_damaged_array_record_names_its_file(prepared, tmp_path):
  folder = shutil.copytree(prepared / "vrt80k", tmp_path / "vrt80k")
  (path,) = folder.rglob("*.array_record*")
  data = bytearray(path.read_bytes())
  data[1_000_000] ^= 1
  path.write_bytes(data)
  source = sources.train_source(tmp_path)
  errors = []
  for i in range(NUM_PHOTOS):
    try:
      source[i]
    except ValueError as error:
      errors.append(str(error))
  assert len(errors) == 1 and errors[0].startswith(f"corrupt record: record 4, in {path}: ")
  path.unlink()
  with pytest.raises(ValueError, match=f"1 files of {folder}/1.0.0 are missing, .*{path.name}"):
    sources.train_source(tmp_path)


def test_what_is_missing_is_said(prepared, tmp_path):
  with pytest.raises(ValueError, match="no file matches"):
    sources.train_source(str(tmp_path / "*.tfrecord"))
  with pytest.raises(ValueError, match=r"holds no vrt80k data set: .*scripts\.prepare_data"):
    sources.train_source(tmp_path)
  with pytest.raises(ValueError, match="holds no vrt_eval data set"):
    sources.eval_source(prepared / "vrt80k")


def test_the_first_records_or_all(photos):
  data = photos / "photos_eval.tfrecord"
  everything = [record.key for record in sources.eval_source(data)]
  for count, expected in ((2, everything[:2]), (0, everything), (len(everything) + 1, everything)):
    assert [record.key for record in sources.eval_records(data, count)] == expected


def test_stored_keys_are_used_where_they_fit(prepared, tmp_path):
  folder = shutil.copytree(prepared / "vrt80k" / "1.0.0", tmp_path / "vrt80k" / "1.0.0")
  keys = sources.train_source(tmp_path).keys()
  (folder / "keys.json").write_text('["a", "b", "c", "d", "e", "f", "g"]')
  assert sources.train_source(tmp_path).keys() == list("abcdefg")
  (folder / "keys.json").write_text('["a"]')
  assert sources.train_source(tmp_path).keys() == keys


def test_record_files_need_neither_jax_nor_tfds():
  code = (
    "import sys, vrt_jax.data.sources;"
    "sys.exit(bool({'jax', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)))"
  )
  root = Path(__file__).resolve().parents[2]
  assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
