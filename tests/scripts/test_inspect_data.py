"""inspect_data: what is printed and drawn is what the record holds; verification counts."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import inspect_data
from tests import tiny
from vrt_jax import cli
from vrt_jax.data import tfds_builders
from vrt_jax.data.records import EvalRecord, TFRecordWriter, TrainRecord, serialize_eval
from vrt_jax.data.trace import SEG, training_example
from vrt_jax.ops.masks import decode_rle


def write_eval(path: Path, *records: EvalRecord) -> str:
  with TFRecordWriter(path) as writer:
    for record in records:
      writer.write(serialize_eval(record))
  return str(path)


@pytest.fixture
def train_file(tmp_path) -> str:
  return tiny.write_train(tmp_path / "train.tfrecord", [tiny.train_record(i) for i in range(4)])


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
  """Runs the command; gives (exit status, output, its error line)."""

  def command(*args: object) -> tuple[int, str, str]:
    line = list(map(str, args))
    status = 0
    try:
      cli.run(lambda: inspect_data.main(cli.parse(inspect_data.Args, line, "inspect_data")))
    except SystemExit as stop:
      status = stop.code
    out, err = capsys.readouterr()
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(errors) == (status != 0) and "Traceback" not in err
    return status, out, "".join(errors)

  return command


def test_a_training_record_as_text_and_picture(run, train_file, tmp_path):
  record = tiny.train_record(2)
  out = tmp_path / "record.png"
  status, text, _ = run("--data", train_file, "--index", 2, "--out", out)
  assert status == 0
  _, target, tags = training_example(record.annotation)
  candidate = record.annotation["generated_ver_data"]["candidates"][0]
  assert f"key: {record.key}" in text and "record 2 of 4" in text
  assert f"question: {candidate['question']}" in text
  assert " ".join(target.split()) in " ".join(text.split())
  assert f"{len(tags)} masks" in text and text.count(SEG) == len(tags)
  for tag, info in record.annotation["original_annotation"]["objects_anns"].items():
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {tag} ")]
    assert info["caption"] in line
    assert (f"{tags.count(tag)}x" in line) == (tag in tags)
  with Image.open(out) as picture:
    assert picture.width == 1600
    drawn = np.asarray(picture.convert("RGB"))
  other = tmp_path / "other.png"
  run("--data", train_file, "--index", 1, "--out", other)
  assert not np.array_equal(drawn, np.asarray(Image.open(other).convert("RGB")))


def test_the_areas_are_those_of_the_masks(run, tmp_path):
  record = tiny.eval_record(0)
  data = write_eval(tmp_path / "eval.tfrecord", record)
  status, text, _ = run("--data", data, "--out", tmp_path / "a.png")
  assert status == 0 and (tmp_path / "a.png").is_file()
  for name in record.answer_ids:
    share = decode_rle(record.objects[name]["mask"]).mean()
    (line,) = [line for line in text.splitlines() if line.startswith(f"  <obj{name}> ")]
    assert f"{share:.2%}" in line and "answer" in line
    assert record.objects[name]["caption"] in line


def test_a_record_is_found_by_its_key(run, train_file):
  _, text, _ = run("--data", train_file, "--key", tiny.train_record(3).key)
  assert "record 3 of 4" in text
  status, _, error = run("--data", train_file, "--key", "nobody")
  assert status == 1 and "no record has the key 'nobody'" in error


def test_the_layout_is_found_out(run, tmp_path, train_file):
  data = write_eval(tmp_path / "eval.tfrecord", tiny.eval_record(0))
  tfds_builders.build(tfds_builders.VrtEval, data, tmp_path / "sets")
  assert f"key: {tiny.eval_record(0).key}" in run("--data", tmp_path / "sets")[1]
  tfds_builders.build(tfds_builders.Vrt80k, train_file, tmp_path / "sets")
  status, _, error = run("--data", tmp_path / "sets")
  assert status == 1 and "choose one with --kind" in error
  _, text, _ = run("--data", tmp_path / "sets", "--kind", "train")
  assert f"key: {tiny.train_record(0).key}" in text


def unusable(folder: Path) -> str:
  """Six good records and two that cannot be used."""
  good = tiny.train_record(0)
  records = [tiny.train_record(i) for i in range(6)]
  records += [TrainRecord("cut", good.image[:-300], good.annotation)]
  records += [TrainRecord("silent", good.image, {})]
  return tiny.write_train(folder / "train.tfrecord", records)


@pytest.mark.parametrize("workers", [0, 2])
def test_verification_counts(run, tmp_path, monkeypatch, workers):
  monkeypatch.setattr(inspect_data, "CHUNK_RECORDS", 3)
  args = ["--data", unusable(tmp_path), "--verify", "--num-workers", workers]
  status, text, error = run(*args, "--pictures", "full")
  assert status == 1 and "2 of 8 records are unusable, more than --max-bad-share 0.05" in error
  assert "6  usable" in text and "2  unusable (25.00%)" in text
  assert "1  corrupt image: first cut:" in text and "1  no candidates: first silent:" in text
  status, text, _ = run(*args, "--max-bad-share", 0.2)
  assert status == 0 and "7  usable" in text  # a header is not cut


def test_statistics(run, train_file):
  status, text, _ = run("--data", train_file, "--verify", "--num-workers", 0)
  assert status == 0
  counts = sorted(len(training_example(tiny.train_record(i).annotation)[2]) for i in range(4))
  (line,) = [line for line in text.splitlines() if line.startswith("mentions")]
  assert [line.split()[1], line.split()[-1]] == [str(counts[0]), str(counts[-1])]
  widths = [Image.open(io.BytesIO(tiny.train_record(i).image)).width for i in range(4)]
  (line,) = [line for line in text.splitlines() if line.startswith("width")]
  assert line.split()[2::3] == [str(min(widths)), str(max(widths))]
  assert min(widths) < max(widths)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--index", 4], "there is no record 4, the places are 0 to 3"),
    (["--index", 1, "--key", "a"], "give either --index or --key"),
    (["--verify", "--index", 1], "--verify looks at all records"),
    (["--kind", "eval"], "missing feature: objects_info_json"),
    (["--data", "none*"], "no file matches 'none*'"),
    (["--data", "."], "holds no vrt80k data set"),
    (["--index", "x"], "--index"),
  ],
)
def test_bad_input_ends_with_one_line(run, train_file, tmp_path, monkeypatch, args, message):
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path / "empty")
  status, _, error = run("--data", train_file, *args)
  assert status == 1 and message in error


def test_an_unusable_record_is_said(run, tmp_path):
  status, _, error = run("--data", unusable(tmp_path), "--index", 6, "--out", tmp_path / "a.png")
  assert status == 1 and error.startswith("error: corrupt image: ")
  assert not (tmp_path / "a.png").exists()
