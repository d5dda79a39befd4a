"""Generating and scoring VRT-Eval records with one command."""

import dataclasses
import hashlib
import json
import re
import shutil

import jax
import numpy as np
import pytest

from converters import from_hf
from converters.checkpoints import find_model
from eval import merge, vrt_bench
from tests import tiny
from tests.train import processes
from vrt_jax import evaluate, model_directory
from vrt_jax.config import EvalConfig, MeshConfig
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import TFRecordWriter, serialize_eval
from vrt_jax.data.trace import mentions
from vrt_jax.generate.predictor import Prediction, Request
from vrt_jax.metrics.results import RESULTS_FILE, score_sample
from vrt_jax.ops.masks import as_rle


class LeftHalf:
  """A predictor whose answers are the questions and whose mask is the left half."""

  def __init__(self):
    self.asked = []

  def predict(self, requests):
    for request in requests:
      self.asked.append(request.question)
      picture = decode_image(request.image)
      mask = np.zeros((1, picture.height, picture.width), bool)
      mask[..., : picture.width // 2] = True
      text = f"<answer>{request.question} (<vea><obj1> [SEG]</vea>)</answer>"
      yield Prediction(text, mentions(text), mask, [0.5], truncated=False)


def test_results_keep_the_order_of_the_records(tmp_path):
  records = [tiny.eval_record(i) for i in range(3)]
  predictor = LeftHalf()
  config = EvalConfig(num_pictures=1)
  results = evaluate.evaluate(predictor, records, tmp_path, config, order=[2, 0, 1])
  assert predictor.asked == [records[i].question for i in (2, 0, 1)]
  details = results["detailed_results"]
  assert [d["sample_info"]["key"] for d in details] == [r.key for r in records]
  assert all(r.question in d["prediction"]["text"] for r, d in zip(records, details, strict=True))
  assert [path.name for path in tmp_path.glob("*.png")] == ["001.png"]


def test_labels_of_a_record_are_in_the_results(tmp_path):
  record = dataclasses.replace(tiny.eval_record(0), confidence=4)
  config = EvalConfig(num_pictures=0)
  results = evaluate.evaluate(LeftHalf(), [record], tmp_path, config, thinking=False)
  (detail,) = results["detailed_results"]
  info, truth = detail["sample_info"], detail["ground_truth"]
  assert info["human_confidence"] == 4 and info["class_ids"] == record.class_ids
  assert info["image_id"] == hashlib.sha256(record.image).hexdigest()[:16]
  assert [str(i) for i in truth["reasoning_obj_ids"]] == record.reasoning_ids
  assert [str(i) for i in truth["answer_obj_ids"]] == record.answer_ids
  for role, ids in (("reasoning", record.reasoning_ids), ("answer", record.answer_ids)):
    assert truth[f"{role}_masks_rle"] == [as_rle(record.objects[i]["mask"]) for i in ids]
  assert detail["prediction"]["thinking"] is False


def test_programs_that_are_compiled_are_counted(tmp_path, capsys):
  class Compiling(LeftHalf):
    def predict(self, requests):
      if len(self.asked) < 2:  # the first batches
        jax.jit(lambda x: x + len(self.asked))(0)
      yield from super().predict(requests)

  records = [tiny.eval_record(i) for i in range(3)]
  evaluate.evaluate(Compiling(), records, tmp_path, EvalConfig(batch_size=1, num_pictures=0))
  counts = re.findall(r"programs compiled (\d+)", capsys.readouterr().err)
  assert counts[-1] == "2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  loaded = tiny.loaded()
  model_directory.save(folder / "model", loaded.model, loaded.tokenizer, loaded.image)
  with TFRecordWriter(folder / "eval.tfrecord") as writer:
    for i in range(3):
      writer.write(serialize_eval(tiny.eval_record(i)))
  return {"checkpoint": str(folder / "model"), "data": str(folder / "eval.tfrecord")}


def test_all_files_are_written(inputs, tmp_path):
  args = vrt_bench.Args(
    **inputs, out=tmp_path, no_thinking=True, max_new_tokens=4, batch_size=2, pictures=2
  )
  results = vrt_bench.bench(args)
  assert json.loads((tmp_path / "ver_evaluation_results.json").read_text()) == results
  assert results["total_samples"] == 3 and results["use_thinking"] is False
  assert results["model_path"] == inputs["checkpoint"] and len(results["config_hash"]) == 12
  assert sorted(path.name for path in tmp_path.glob("*.png")) == ["001.png", "002.png"]
  assert (tmp_path / "report.html").read_text().count("data:image/jpeg") == 3
  assert evaluate.headline(results).startswith("R-LQ ")


class Killed(Exception):
  """Stops a run in the middle."""


@pytest.fixture
def fast(monkeypatch):
  """A bench whose predictor is `LeftHalf`; gives the questions that were asked."""
  predictor = LeftHalf()
  monkeypatch.setattr(vrt_bench, "Predictor", lambda *given, **settings: predictor)
  return predictor.asked


def bench_args(inputs, out, **changes) -> vrt_bench.Args:
  return vrt_bench.Args(**inputs, out=out, pictures=2, **changes)


@pytest.mark.parametrize("no_thinking", [False, True])
def test_settings_reach_the_predictor(inputs, tmp_path, monkeypatch, no_thinking):
  given = []

  def predictor(loaded, config, *, thinking, mesh):
    given.append((config.batch_size, config.max_new_tokens, config.max_masks, thinking, mesh))
    return LeftHalf()

  monkeypatch.setattr(vrt_bench, "Predictor", predictor)
  settings = {"batch_size": 2, "max_new_tokens": 7, "max_masks": 3, "no_thinking": no_thinking}
  vrt_bench.bench(bench_args(inputs, tmp_path, **settings))
  assert given == [(2, 7, 3, not no_thinking, None)]


def content(folder) -> dict[str, bytes]:
  """Bytes of the results file and the pictures."""
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".png")}


def test_a_killed_run_goes_on_and_gives_the_same_files(inputs, fast, tmp_path, monkeypatch):
  straight, resumed = tmp_path / "straight", tmp_path / "resumed"
  vrt_bench.bench(bench_args(inputs, straight))
  asked = list(fast)
  fast.clear()
  real = LeftHalf.predict

  def stops(self, requests):
    if len(self.asked) == 2:
      raise Killed
    yield from real(self, requests)

  with monkeypatch.context() as patch:
    patch.setattr(LeftHalf, "predict", stops)
    with pytest.raises(Killed):
      vrt_bench.bench(bench_args(inputs, resumed))
  partial = resumed / "partial.jsonl"
  assert len(partial.read_text().splitlines()) == 3 and len(content(resumed)) < 3
  partial.write_bytes(partial.read_bytes()[:-7])  # a line that the kill cut
  vrt_bench.bench(bench_args(inputs, resumed))
  assert fast == asked[:2] + asked[1:]  # the second again, then what was left
  assert content(resumed) == content(straight)
  assert not partial.exists()


def test_a_partial_run_of_other_settings_is_refused(inputs, fast, tmp_path):
  (tmp_path / "partial.jsonl").write_text('{"settings": ["other"]}\n')
  with pytest.raises(ValueError, match="other settings"):
    vrt_bench.bench(bench_args(inputs, tmp_path))


def test_three_shards_are_one_run(inputs, fast, tmp_path):
  whole = vrt_bench.bench(bench_args(inputs, tmp_path / "whole"))
  shards = [tmp_path / f"shard{i}" for i in (2, 0, 1)]
  for folder in shards:
    vrt_bench.bench(bench_args(inputs, folder, shard=f"{folder.name[-1]}/3"))
  merged = merge.merge(merge.Args(tuple(shards), inputs["data"], tmp_path / "merged"))
  assert merged == whole
  name = "ver_evaluation_results.json"
  assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
  with pytest.raises(ValueError, match="shards have 2 samples, the data 3"):
    merge.merge(merge.Args(tuple(shards[:2]), inputs["data"], tmp_path / "two"))
  with pytest.raises(ValueError, match="is in another shard too"):
    merge.merge(merge.Args((*shards, shards[0]), inputs["data"], tmp_path / "twice"))
  other = json.loads((shards[0] / name).read_text()) | {"config_hash": "other"}
  (shards[0] / name).write_text(json.dumps(other))
  with pytest.raises(ValueError, match="different values of config_hash"):
    merge.merge(merge.Args(tuple(shards), inputs["data"], tmp_path / "mixed"))
  with pytest.raises(ValueError, match="cannot be read"):
    merge.merge(merge.Args((tmp_path,), inputs["data"], tmp_path / "none"))
  for content in ("[]", "{}", '{"detailed_results": 3}'):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="is not a results file"):
      merge.merge(merge.Args((tmp_path,), inputs["data"], tmp_path / "none"))


def _take_scores(results):
  """Mask scores, whose last bits depend on how a batch is divided; they leave `results`."""
  objects = [o for d in results["detailed_results"] for o in d["prediction"]["objects"]]
  assert objects
  return [o.pop("score") for o in objects]


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, machines",
  [((), None), (("--mesh.data", "2", "--mesh.tensor", "2"), [processes.FOUR_DEVICES])],
)
def test_many_devices_are_one_run(mesh, machines, inputs, tmp_path):
  """Two processes of one device each, and four devices of one process."""

  def arguments(name):
    sizes = ["--max-new-tokens", "144", "--batch-size", "2"]
    return ["--data", inputs["data"], "--out", str(tmp_path / name), *sizes]

  one = processes.start_module("eval.vrt_bench", *arguments("one"))
  assert processes.finish(one)[0] == 0
  runs = [
    processes.start_module("eval.vrt_bench", *arguments("two"), *mesh, variables=variables)
    for variables in machines or processes.rendezvous(2)
  ]
  leader, *followers = (processes.finish(run) for run in runs)
  assert leader[0] == 0 and "R-LQ " in leader[1], leader[2]
  for status, printed, errors in followers:
    assert status == 0 and "R-LQ " not in printed, errors
  files = sorted(path.name for path in (tmp_path / "one").iterdir())
  assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
  for name in set(files) - {RESULTS_FILE}:
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
  results, expected = (
    json.loads((tmp_path / name / RESULTS_FILE).read_text()) for name in ("two", "one")
  )
  assert _take_scores(results) == pytest.approx(_take_scores(expected), abs=1e-6)
  assert results == expected
  assert results["metrics"]["reasoning_lq"] > 0.3


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "a/b", "1/0", "0/-2"])
def test_shards_have_a_form(text):
  with pytest.raises(ValueError, match="--shard"):
    vrt_bench.shard_of(text)


def test_the_bar_shows_the_numbers_so_far():
  record = tiny.eval_record(0)
  (found,) = LeftHalf().predict([Request(record.image, record.question)])
  sample = evaluate.sample_result(record, found.text, found.objects(), thinking=True)
  line = evaluate.running_metrics([score_sample(sample)])
  assert line.startswith("R-LQ 0.0") and "A-mIoU" in line


def test_a_mesh_has_the_devices_that_there_are(inputs, fast, tmp_path):
  with pytest.raises(ValueError, match="does not fit"):
    vrt_bench.bench(bench_args(inputs, tmp_path, mesh=MeshConfig(data=3)))
  assert not fast


def test_code_and_seed_are_in_the_results(inputs, fast, tmp_path):
  results = vrt_bench.bench(bench_args(inputs, tmp_path))
  assert results["seed"] == 0 and results["code_version"].startswith("0.")


def test_checkpoints_of_a_training_and_of_the_hub(inputs, tmp_path, monkeypatch):
  model = inputs["checkpoint"]
  assert find_model("shapes", tmp_path) == "shapes" and find_model(model, tmp_path) == model
  work = tmp_path / "work"
  (work / "checkpoints").mkdir(parents=True)
  with pytest.raises(ValueError, match="has not finished"):
    find_model(str(work), tmp_path)
  shutil.copytree(model, work / "model")
  assert find_model(str(work), tmp_path) == str(work / "model")
  asked = []

  def convert(args):
    asked.append(args.src)
    shutil.copytree(model, args.dst)

  monkeypatch.setattr(from_hf, "convert", convert)
  out = tmp_path / "out"
  for _ in range(2):  # converted once
    assert find_model("owner/name", out) == str(out / "model")
  assert asked == ["owner/name"]
  folder = tmp_path / "hf"
  folder.mkdir()
  (folder / "model-00001.safetensors").write_bytes(b"")
  assert find_model(str(folder), tmp_path / "other") == str(tmp_path / "other" / "model")
  assert asked == ["owner/name", str(folder)]
