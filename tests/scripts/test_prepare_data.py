"""prepare_data: the set equals its source, goes on after a kill, and says what it dropped."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from scripts import prepare_data
from tests import tiny
from vrt_jax import cli
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import (
  TFRecordWriter,
  TrainRecord,
  read_eval_records,
  read_train_records,
  serialize_example,
  serialize_train,
)
from vrt_jax.data.sources import eval_source, train_source

ROOT = Path(__file__).resolve().parents[2]


def prepare(src: object, out: Path, **options: object) -> None:
  """The command in this process, without workers."""
  prepare_data.main(prepare_data.Args(src=str(src), out=out, **{"num_workers": 0, **options}))


def copies(folder: Path, shards: int, each: int) -> str:
  """Files of small records with keys of their own; gives their glob."""
  folder.mkdir(exist_ok=True)
  record = tiny.train_record(0)
  for shard in range(shards):
    keyed = [TrainRecord(f"{shard}_{i}", record.image, record.annotation) for i in range(each)]
    tiny.write_train(folder / f"part-{shard:03}.tfrecord", keyed)
  return str(folder / "*.tfrecord")


def shard_files(out: Path) -> dict[str, int]:
  """Names of the ArrayRecord files below a folder, and when they were written."""
  return {path.name: path.stat().st_mtime_ns for path in out.rglob("*.array_record*")}


def test_photographs_come_back_record_by_record(photos, tmp_path, capsys):
  path = photos / "photos_train.tfrecord"
  prepare(path, tmp_path, verify="full")
  expected = list(read_train_records(str(path)))
  source = train_source(tmp_path)
  assert [source[i] for i in range(len(source))] == expected
  assert all(a.image == b.image for a, b in zip(source, expected, strict=True))
  assert source.keys() == [record.key for record in expected]
  assert "7  written" in capsys.readouterr().out


def test_evaluation_photographs_come_back_record_by_record(photos, tmp_path):
  path = photos / "photos_eval.tfrecord"
  prepare(path, tmp_path, kind="eval")
  source = eval_source(tmp_path)
  assert [source[i] for i in range(len(source))] == list(read_eval_records(str(path)))


def test_tfds_reads_the_set_on_its_own(tmp_path):
  prepare(copies(tmp_path / "src", shards=3, each=2), tmp_path / "out")
  builder = tfds.builder_from_directory(tmp_path / "out" / "vrt80k" / "1.0.0")
  assert builder.info.splits["train"].shard_lengths == [2, 2, 2]
  examples = builder.as_data_source("train")
  assert [e["key"].decode() for e in examples] == ["0_0", "0_1", "1_0", "1_1", "2_0", "2_1"]
  expected = np.asarray(decode_image(tiny.train_record(0).image))
  np.testing.assert_array_equal(examples[3]["image"], expected)
  files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
  assert files == {
    *(f"vrt80k-train.array_record-0000{i}-of-00003" for i in range(3)),
    *("dataset_info.json", "features.json", "keys.json", "report.json"),
  }


def with_bad_records(folder: Path) -> str:
  """Two files: 17 good records and four bad ones, then a single bad one."""
  good = tiny.train_record(0)
  pair = [TrainRecord(f"good_{i}", good.image, good.annotation) for i in range(17)]
  objects = good.annotation["original_annotation"]["objects_anns"]
  empty = {"objects_anns": {tag: {"segmentation": []} for tag in objects}}
  bad = [
    TrainRecord("cut", b"no jpeg", good.annotation),
    TrainRecord("silent", good.image, {}),
    tiny.with_annotation(good, "empty", original_annotation=empty),
  ]
  with TFRecordWriter(folder / "a.tfrecord") as writer:
    for record in [*pair[:5], *bad, *pair[5:]]:
      writer.write(serialize_train(record))
    writer.write(serialize_example({"image": [b""]}))
  tiny.write_train(folder / "b.tfrecord", [TrainRecord("cut too", b"", good.annotation)])
  return str(folder / "*.tfrecord")


def test_unusable_records_are_dropped_by_reason(tmp_path, capsys):
  src = with_bad_records(tmp_path)
  prepare(src, tmp_path / "out", max_bad_share=0.25)
  report = json.loads((tmp_path / "out/vrt80k/1.0.0/report.json").read_text())
  assert (report["records_read"], report["records_written"]) == (22, 17)
  drops = {reason: (drop["count"], drop["key"]) for reason, drop in report["drops"].items()}
  assert drops == {
    "corrupt image": (2, "cut"),
    "no candidates": (1, "silent"),
    "bad mask": (1, "empty"),
    "missing feature": (1, "record 20"),
  }
  source = train_source(tmp_path / "out")
  assert source.keys() == [source[i].key for i in range(17)] == [f"good_{i}" for i in range(17)]
  out = capsys.readouterr().out
  assert "5  dropped (22.73%)" in out and "2  corrupt image: first cut: 7 bytes" in out


def test_too_many_unusable_records_are_an_error(tmp_path):
  src = with_bad_records(tmp_path)
  with pytest.raises(ValueError, match=r"5 of 22 records are unusable.*2  corrupt image: first"):
    prepare(src, tmp_path / "out", max_bad_share=0.2)
  with pytest.raises(ValueError, match="holds no vrt80k data set"):
    train_source(tmp_path / "out")
  # with a higher limit the same shards are taken as they are
  before = shard_files(tmp_path / "out")
  prepare(src, tmp_path / "out", max_bad_share=0.3)
  assert shard_files(tmp_path / "out") == before and len(before) == 2


def test_hopeless_data_is_given_up_early(tmp_path):
  good = tiny.train_record(0)
  for name in "abcdef":
    bad = [TrainRecord(f"{name}{i}", b"", good.annotation) for i in range(5)]
    tiny.write_train(tmp_path / f"{name}.tfrecord", bad)
  with pytest.raises(ValueError, match="5 of 5 records are unusable"):
    prepare(tmp_path / "*.tfrecord", tmp_path / "out")


def test_only_full_verification_sees_a_cut_picture(tmp_path):
  good = tiny.train_record(0)
  records = [TrainRecord("cut", good.image[:-300], good.annotation), good]
  path = tiny.write_train(tmp_path / "a.tfrecord", records)
  prepare(path, tmp_path / "header", verify="header")
  assert train_source(tmp_path / "header").keys() == ["cut", good.key]
  prepare(path, tmp_path / "full", verify="full", max_bad_share=0.5)
  assert train_source(tmp_path / "full").keys() == [good.key]


def test_answers_alone_are_kept_where_asked(tmp_path):
  record = tiny.train_record(0)
  candidate = dict(record.annotation["generated_ver_data"]["candidates"][0])
  del candidate["reasoning"]
  changed = tiny.with_annotation(record, "a", generated_ver_data={"candidates": [candidate]})
  path = tiny.write_train(tmp_path / "a.tfrecord", [changed])
  with pytest.raises(ValueError, match="missing text: first a: reasoning of the first candidate"):
    prepare(path, tmp_path / "out")
  prepare(path, tmp_path / "out", thinking=False)
  assert list(train_source(tmp_path / "out")) == [changed]


def test_damaged_files_are_named_together(tmp_path):
  src = copies(tmp_path / "src", shards=4, each=3)
  for shard in (1, 3):
    path = tmp_path / "src" / f"part-00{shard}.tfrecord"
    path.write_bytes(path.read_bytes()[:-9])
  message = r"2 of 4 files are damaged: .*part-001\.tfrecord at byte .*part-003\.tfrecord at byte"
  with pytest.raises(ValueError, match=message):
    prepare(src, tmp_path / "out")
  done = shard_files(tmp_path / "out")
  assert len(done) == 2
  # mended, the others are not written again
  copies(tmp_path / "mended", shards=4, each=3)
  for shard in (1, 3):
    name = f"part-00{shard}.tfrecord"
    os.replace(tmp_path / "mended" / name, tmp_path / "src" / name)
  prepare(src, tmp_path / "out")
  after = shard_files(tmp_path / "out")
  assert len(after) == 4 and done.items() <= after.items()
  assert len(train_source(tmp_path / "out")) == 12


@pytest.mark.parametrize("change", ["source", "shard", "report", "verify"])
def test_shards_are_written_again_where_something_changed(tmp_path, change):
  src = copies(tmp_path / "src", shards=2, each=2)
  other = tmp_path / "src" / "part-001.tfrecord"
  good = other.read_bytes()
  other.write_bytes(good[:-1])
  with pytest.raises(ValueError, match="1 of 2 files are damaged"):
    prepare(src, tmp_path / "out")
  other.write_bytes(good)
  before = shard_files(tmp_path / "out")
  partial = tmp_path / "out/vrt80k/1.0.0.partial"
  if change == "source":
    tiny.write_train(tmp_path / "src" / "part-000.tfrecord", [tiny.train_record(1)])
  elif change == "shard":
    next(partial.glob("*00000-of*")).write_bytes(b"")
  elif change == "report":
    (partial / "progress" / "00000.json").write_text("{")
  (partial / "stray.tmp").touch()
  prepare(src, tmp_path / "out", verify="full" if change == "verify" else "header")
  after = shard_files(tmp_path / "out")
  assert not before.items() & after.items()
  assert len(train_source(tmp_path / "out")) == (3 if change == "source" else 4)
  assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_complete_set_is_left_alone(tmp_path, capsys):
  src = copies(tmp_path / "src", shards=1, each=2)
  prepare(src, tmp_path / "out")
  before = shard_files(tmp_path / "out")
  prepare(src, tmp_path / "out")
  assert shard_files(tmp_path / "out") == before
  assert "is complete already" in capsys.readouterr().out
  with pytest.raises(ValueError, match="holds other files' records"):
    prepare(copies(tmp_path / "more", shards=2, each=2), tmp_path / "out")
  (tmp_path / "out/vrt80k/1.0.0/report.json").unlink()
  with pytest.raises(ValueError, match="exists: delete it or choose another --out"):
    prepare(src, tmp_path / "out")


def command(src: str, out: Path, workers: int) -> list[str]:
  options = ["--src", src, "--out", str(out), "--num-workers", str(workers)]
  return [sys.executable, "-m", "scripts.prepare_data", *options]


def children(pid: int) -> list[int]:
  """Processes that work for `pid`; the tracker of shared memory is none of them."""
  found = []
  for task in Path(f"/proc/{pid}/task").iterdir():
    for child in (task / "children").read_text().split():
      line = Path(f"/proc/{child}/cmdline").read_text()
      found += [int(child)] if "resource_tracker" not in line else []
  return found


def alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_run_goes_on(tmp_path, victim):
  src, out = copies(tmp_path / "src", shards=12, each=120), tmp_path / "out"
  run = subprocess.Popen(
    command(src, out, 1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  reports = out / "vrt80k/1.0.0.partial/progress"
  while run.poll() is None and len(list(reports.glob("*.json"))) < 2:
    time.sleep(0.005)
  (worker,) = children(run.pid)
  os.kill(worker if victim == "worker" else run.pid, signal.SIGKILL)
  _, errors = run.communicate(timeout=60)
  if victim == "worker":
    assert run.returncode == 1
    assert errors.splitlines()[-1].startswith("error: a worker process died")
  for _ in range(1000):
    if not alive(worker):
      break
    time.sleep(0.01)
  assert not alive(worker)
  with pytest.raises(ValueError, match="holds no vrt80k data set"):
    train_source(out)
  finished = {f"-000{path.stem[-2:]}-of-" for path in reports.glob("*.json")}
  before = {name: at for name, at in shard_files(out).items() if any(f in name for f in finished)}
  assert 2 <= len(before) < 12

  again = subprocess.run(
    command(src, out, 2), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
  )
  assert again.returncode == 0, again.stderr
  assert f"{len(before)} of 12 shards are done already" in again.stdout
  after = shard_files(out)
  assert len(after) == 12 and before.items() <= after.items()
  assert train_source(out).keys() == [f"{s}_{i}" for s in range(12) for i in range(120)]
  assert not list(out.rglob("*.tmp"))


def test_a_killed_worker_keeps_no_lock(monkeypatch):
  """One that dies as it counts or looks leaves nothing that the parent would wait for."""
  shared = prepare_data._Shared.create(multiprocessing.get_context("spawn"), 3)
  assert not hasattr(shared.read_bytes, "get_lock") and not hasattr(shared.stop, "get_lock")
  monkeypatch.setattr(prepare_data, "_shared", [shared])
  for index, count in ((0, 5), (2, 7), (2, 1)):
    prepare_data._tick(index, count)
  assert list(shared.read_bytes) == [5, 0, 8]
  shared.stop.value = True
  with pytest.raises(ValueError, match="stopped"):
    prepare_data._tick(1, 1)


def test_two_runs_do_not_write_one_set(tmp_path):
  from scripts.prepared_set import SetFolder

  src = copies(tmp_path / "src", shards=1, each=1)
  with (
    SetFolder(tmp_path / "out", "train").locked([]),
    pytest.raises(ValueError, match="another run is writing to"),
  ):
    prepare(src, tmp_path / "out")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--src", "none*.tfrecord", "--out", "o"], "no file matches 'none*.tfrecord'"),
    (["--src", "a", "--out", "o", "--max-bad-share", "7"], "--max-bad-share must be a share"),
    (["--src", "a", "--out", "o", "--num-workers", "-1"], "--num-workers must be 0 or more"),
    (["--src", "a", "--out", "o", "--kind", "test"], "invalid choice 'test'"),
    (["--out", "o"], "--src"),
  ],
)
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys, args, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stop:
    cli.run(lambda: prepare_data.main(cli.parse(prepare_data.Args, args, "prepare_data")))
  assert stop.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and message in line
  assert os.listdir(tmp_path) == []


def test_help_starts_neither_jax_nor_tfds():
  code = (
    "import sys, scripts.prepare_data;"
    "sys.exit(bool({'jax', 'tensorflow_datasets'} & set(sys.modules)))"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
