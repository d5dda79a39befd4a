"""A model behind an API is asked, its boxes become masks, and the results are scored."""

import base64
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import api_baseline, score
from eval.api import client as client_module
from eval.api_baseline import Args, baseline
from tests import tiny
from tests.eval.api.fake_server import KEY, Asked, Reply, completion, serve, write_records
from vrt_jax import cli, evaluate
from vrt_jax.data.image import decode_image
from vrt_jax.ops.masks import decode_rle, encode_rle

COUNT = 3
OUTPUTS = {
  "predictions.jsonl",
  "report.html",
  "request.json",
  "responses.jsonl",
  "usage.json",
  "ver_evaluation_results.json",
}


def record(index: int):
  """A record of the shapes world whose masks are boxes."""
  original = tiny.eval_record(index)
  objects = {}
  for name, entry in original.objects.items():
    mask = decode_rle(entry["mask"])
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    objects[name] = entry | {"mask": encode_rle(mask)}
  return dataclasses.replace(original, objects=objects)


RECORDS = {record(i).question: record(i) for i in range(COUNT)}


def box(item, name: str, box_format: str, sent: tuple[int, int]) -> list[float]:
  """A labelled object's box as a model writes it; `sent` is (height, width)."""
  mask = decode_rle(item.objects[name]["mask"])
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  shares = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
  shares /= np.array([mask.shape[1], mask.shape[0]] * 2)
  if box_format == "xyxy_px":
    return (shares * np.array([sent[1], sent[0]] * 2)).round(2).tolist()
  thousandths = (1000 * shares).round(1)
  return thousandths[[1, 0, 3, 2] if box_format == "yxyx_1000" else [0, 1, 2, 3]].tolist()


def right_answer(asked: Asked, box_format: str) -> str:
  """A trace with the boxes of all labelled objects."""
  item = RECORDS[asked.text.split("\n")[0]]
  sent = decode_image(sent_bytes(asked))
  size = (sent.height, sent.width)
  key = "box_2d" if box_format == "yxyx_1000" else "bbox_2d"

  def named(ids: list[str]) -> str:
    boxes = [{key: box(item, i, box_format, size), "label": f"object {i}"} for i in ids]
    return " and ".join(f"the thing {json.dumps(b)}" for b in boxes)

  evidence, answer = named(item.reasoning_ids), named(item.answer_ids)
  return f"<think>There is {evidence}.</think>\n\n<answer>It is {answer}.</answer>"


def sent_bytes(asked: Asked) -> bytes:
  return base64.b64decode(asked.data_url.split(";base64,")[1])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.005)
  monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
  return write_records(tmp_path_factory.mktemp("data") / "eval.tfrecord", list(RECORDS.values()))


def args(url: str, data: str, out: Path, **changes: object) -> Args:
  fields = {
    "base_url": url,
    "model": "fake",
    "box_format": "yxyx_1000",
    "data": data,
    "out": out,
    "key_env": "TEST_KEY",
    "masks": "boxes",
    "concurrency": 2,
    "retries": 1,
    "timeout_s": 5.0,
  }
  return Args(**fields | changes)


def no_key_below(folder: Path) -> bool:
  parts = [KEY[i : i + 12].encode() for i in range(len(KEY) - 11)]
  contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
  return bool(contents) and not any(part in content for part in parts for content in contents)


@pytest.mark.parametrize("max_side", [0, 100])
@pytest.mark.parametrize("box_format", ["yxyx_1000", "xyxy_1000", "xyxy_px"])
def test_right_boxes_score_in_every_format(data, tmp_path, box_format, max_side):
  with serve(lambda asked: completion(right_answer(asked, box_format))) as server:
    settings = args(server.url, data, tmp_path, box_format=box_format, max_side=max_side)
    results = baseline(settings)
  sides = [max(decode_image(sent_bytes(asked)).size) for asked in server.asked]
  largest = max(decode_image(next(iter(RECORDS.values())).image).size)
  assert max(sides) <= (112 if max_side else max(largest, 224))
  assert results["metrics"]["answer_miou"] > 0.97 and results["metrics"]["reasoning_miou"] > 0.97
  assert results["invalid"] == 0 and results["total_samples"] == COUNT
  assert results["model_path"] == "fake" and len(results["config_hash"]) == 12
  assert {path.name for path in tmp_path.iterdir()} == OUTPUTS


def test_results_predictions_and_usage(data, tmp_path):
  with serve(lambda asked: completion(right_answer(asked, "yxyx_1000"), 2000, 300)) as server:
    results = baseline(args(server.url, data, tmp_path, input_price=1.0, output_price=10.0))
  assert json.loads((tmp_path / "ver_evaluation_results.json").read_text()) == results
  details = results["detailed_results"]
  assert [d["sample_info"]["question"] for d in details] == list(RECORDS)
  first = details[0]["prediction"]["objects"][0]
  assert first["role"] == "reasoning" and first["phrase"].startswith("object ")
  start, end = first["text_span"]
  assert details[0]["prediction"]["text"][start:end].startswith('the thing {"box_2d": [')
  assert "R-LQ 100.0" in evaluate.headline(results)
  assert (tmp_path / "report.html").read_text().count("data:image/jpeg") == COUNT

  usage = json.loads((tmp_path / "usage.json").read_text())
  api, boxes = usage["api"], usage["boxes"]
  assert (api["questions"], api["answers"], api["errors"], api["failed"]) == (COUNT, COUNT, 0, {})
  assert (api["input_tokens"], api["output_tokens"], api["without_usage"]) == (6000, 900, 0)
  assert api["cost"] == pytest.approx(0.015) and api["served_models"] == ["fake-1"]
  total = sum(len(r.reasoning_ids) + len(r.answer_ids) for r in RECORDS.values())
  assert boxes == {"found": total, "without_mask": 0, "malformed": 0, "empty": 0}
  line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
  mask = decode_rle(line["objects"][0]["rle"])
  x0, y0, x1, y1 = (round(v) for v in line["objects"][0]["box"])
  assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)


@pytest.mark.parametrize("name", ["predictions.jsonl", "ver_evaluation_results.json"])
def test_results_are_rescored_by_eval_score(data, tmp_path, name):
  with serve(lambda asked: completion(right_answer(asked, "yxyx_1000"))) as server:
    results = baseline(args(server.url, data, tmp_path))
  again = score.score(score.ScoreConfig(tmp_path / name, data, tmp_path / "again"))
  for part in ("metrics", "metrics_ci", "precision", "raw_answer_ious", "per_cls_metrics"):
    assert again[part] == results[part]
  phrases = [
    [o["phrase"] for o in d["prediction"]["objects"]]
    for r in (results, again)
    for d in r["detailed_results"]
  ]
  assert all(all(p) for p in phrases[:COUNT])
  assert phrases[:COUNT] == phrases[COUNT:]


def test_answers_that_are_no_traces_score_nothing(data, tmp_path):
  texts = ["I cannot tell.", None, "<answer>it {'box_2d': [1, 2, 3]} [9, 9, 9, 9]</answer>"]

  def answer(asked: Asked) -> Reply:
    text = texts[len(server.asked) % 3]
    return completion(text, finish_reason="length" if text is None else "stop")

  with serve(answer) as server:
    results = baseline(args(server.url, data, tmp_path))
  assert results["metrics"]["answer_miou"] == 0 and results["invalid"] == 1
  usage = json.loads((tmp_path / "usage.json").read_text())
  assert usage["boxes"] == {"found": 0, "without_mask": 0, "malformed": 1, "empty": 1}
  assert usage["api"]["cut_off"] == 1


def test_boxes_beyond_the_limit_have_no_mask(data, tmp_path):
  text = f"<think>{'a [0, 0, 500, 500] ' * 5}</think> <answer>b [0, 0, 9, 9]</answer>"
  with serve(lambda asked: completion(text)) as server:
    results = baseline(args(server.url, data, tmp_path, max_boxes=4))
  assert results["detailed_results"][0]["prediction"]["num_reasoning_masks"] == 4
  assert results["detailed_results"][0]["error"] == "no_answer_mask"
  assert json.loads((tmp_path / "usage.json").read_text())["boxes"]["without_mask"] == 2 * COUNT


def test_errors_stop_the_scoring_or_count_as_empty(data, tmp_path):
  bad = list(RECORDS)[1]

  def answer(asked: Asked) -> Reply:
    if asked.text.startswith(bad):
      return Reply({"error": {"message": f"no, {asked.headers['authorization']}"}}, 400)
    return completion(right_answer(asked, "yxyx_1000"))

  with serve(answer) as server:
    with pytest.raises(ValueError, match=r"1 of 3 questions have no answer, .* --allow-errors"):
      baseline(args(server.url, data, tmp_path))
    assert not (tmp_path / "ver_evaluation_results.json").exists()
    usage = json.loads((tmp_path / "usage.json").read_text())["api"]
    assert usage["errors"] == 1
    assert usage["failed"] == {RECORDS[bad].key: "HTTP 400: no, Bearer [key]"}
    results = baseline(args(server.url, data, tmp_path, allow_errors=True))
  assert len(server.asked) == COUNT + 1
  assert [d["error"] for d in results["detailed_results"]] == ["", "no_answer_span", ""]
  again = score.score(score.ScoreConfig(tmp_path / "predictions.jsonl", data, tmp_path / "again"))
  assert again["metrics"] == results["metrics"]


def test_no_file_holds_the_key(data, tmp_path):
  def answer(asked: Asked) -> Reply:
    if len(server.asked) == 1:
      return Reply({"error": {"message": str(asked.headers)}}, 503, {"X-Echo": KEY})
    return completion(right_answer(asked, "yxyx_1000") + str(asked.headers))

  with serve(answer) as server:
    baseline(args(server.url, data, tmp_path))
  assert no_key_below(tmp_path)


@pytest.mark.parametrize("place", ["model", "extra", "base_url"])
def test_a_key_among_the_arguments_is_refused(data, tmp_path, place):
  values = {"model": KEY, "extra": json.dumps({"user": KEY}), "base_url": f"http://h/{KEY}"}
  with pytest.raises(ValueError, match="TEST_KEY alone") as error:
    baseline(args("http://127.0.0.1:9", data, tmp_path / "o", **{place: values[place]}))
  assert KEY not in str(error.value) and not (tmp_path / "o").exists()


def test_masks_can_be_made_again_without_asking(data, tmp_path):
  with serve(lambda asked: completion(right_answer(asked, "yxyx_1000"))) as server:
    first = baseline(args(server.url, data, tmp_path))
    second = baseline(args(server.url, data, tmp_path, max_boxes=1, concurrency=5))
    assert len(server.asked) == COUNT
    assert first["config_hash"] != second["config_hash"]
    with pytest.raises(ValueError, match="another model"):
      baseline(args(server.url, data, tmp_path, model="other"))
    with pytest.raises(ValueError, match="another box_format"):
      baseline(args(server.url, data, tmp_path, box_format="xyxy_px"))
    assert len(server.asked) == COUNT


def test_masks_by_sam2(data, tmp_path):
  """The default, of the shipped model."""
  with serve(lambda asked: completion(right_answer(asked, "yxyx_1000"))) as server:
    filled = baseline(args(server.url, data, tmp_path))
    results = baseline(args(server.url, data, tmp_path, masks="sam2"))
  objects = [d["prediction"]["objects"] for d in results["detailed_results"]]
  assert [len(o) for o in objects] == [
    len(d["prediction"]["objects"]) for d in filled["detailed_results"]
  ]
  assert all(0 < o["score"] < 1 for row in objects for o in row)
  assert results["config_hash"] != filled["config_hash"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"concurrency": 0}, "--concurrency must be above 0"),
    ({"timeout_s": 0.0}, "--timeout-s must be above 0"),
    ({"max_boxes": -1}, "--max-boxes must be above 0"),
    ({"retries": -1}, "--retries must not be negative"),
    ({"input_price": 1.0}, "go together"),
    ({"extra": "{"}, "--extra is not JSON"),
    ({"base_url": "h/v1"}, "--base-url must"),
    ({"data": "none.tfrecord"}, "none.tfrecord"),
    ({"masks": "sam2", "sam2": "none"}, "none is not a model directory"),
  ],
)
def test_bad_arguments(data, tmp_path, changes, message):
  settings = dataclasses.replace(args("http://127.0.0.1:9/v1", data, tmp_path), **changes)
  with pytest.raises(ValueError, match=message):
    baseline(settings)


def test_a_key_twice_in_the_data(tmp_path):
  item = next(iter(RECORDS.values()))
  twice = write_records(tmp_path / "twice.tfrecord", [item, item])
  with pytest.raises(ValueError, match="is there twice"):
    baseline(args("http://127.0.0.1:9/v1", twice, tmp_path / "out"))


def test_command_line(data, tmp_path):
  with serve(lambda asked: completion(right_answer(asked, "xyxy_1000"))) as server:
    command = [sys.executable, "-m", "eval.api_baseline", "--base-url", server.url, "--data", data]
    command += ["--model", "m", "--box-format", "xyxy_1000", "--masks", "boxes"]
    command += ["--out", str(tmp_path), "--num-samples", "2", "--key-env", "TEST_KEY"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "R-LQ 100.0" in done.stdout and "(2 samples)" in done.stdout
  assert KEY not in done.stdout + done.stderr and no_key_below(tmp_path)
  assert "200 + 40 tokens" in done.stderr


def test_a_refused_key_is_one_line(data, tmp_path, monkeypatch, capsys):
  with serve(lambda asked: Reply({"error": {"message": f"bad key {KEY}"}}, 401)) as server:
    line = f"x --base-url {server.url} --model m --box-format xyxy_px --masks boxes"
    line += " --key-env TEST_KEY"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--data", data, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
      cli.run(api_baseline.main)
  assert stop.value.code == 1
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith("error: http://127.0.0.1") and "the key in TEST_KEY (HTTP 401" in last
  assert no_key_below(tmp_path) and not (tmp_path / "report.html").exists()


def test_the_shipped_sam2_is_warned_of(monkeypatch, capsys):
  class Reached(Exception):
    pass

  def reached(args):
    raise Reached

  monkeypatch.setattr(api_baseline, "baseline", reached)
  line = "x --base-url http://h --model m --box-format xyxy_px --data d --out o".split()
  for extra, warned in ([], True), (["--masks", "boxes"], False), (["--sam2", "dir"], False):
    monkeypatch.setattr(sys, "argv", line + extra)
    with pytest.raises(Reached):
      api_baseline.main()
    assert ("never learned boxes" in capsys.readouterr().err) == warned
