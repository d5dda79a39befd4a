"""Scoring saved predictions, and the report."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from eval.report import write_report
from eval.score import ScoreConfig, comparison_lines, load_predictions, score
from vrt_jax.data.records import EvalRecord, TFRecordWriter, serialize_eval
from vrt_jax.data.tfds_builders import VrtEval, build
from vrt_jax.ops.masks import encode_rle

TEXT = (
  "<think>a box (<ver><obj1> [SEG]</ver>)</think>\n\n<answer>it (<vea><obj2> [SEG]</vea>)</answer>"
)


def half(left: bool) -> np.ndarray:
  mask = np.zeros((40, 60), bool)
  mask[:, :30] = left
  mask[:, 30:] = not left
  return mask


def record(key: str, question: str = "which?") -> EvalRecord:
  buffer = io.BytesIO()
  Image.new("RGB", (60, 40), (90, 120, 150)).save(buffer, "JPEG")
  objects = {
    "3": {"mask": encode_rle(half(True)), "caption": "left", "original_id": ""},
    "5": {"mask": encode_rle(half(False)), "caption": "right", "original_id": ""},
  }
  return EvalRecord(key, buffer.getvalue(), question, objects, ["3"], ["5"], ["#loc"], 2)


def prediction(key: str, right: bool = True) -> dict:
  answer = half(not right)
  return {
    "key": key,
    "text": TEXT,
    "objects": [
      {"index": 0, "role": "reasoning", "rle": encode_rle(half(True))},
      {"index": 1, "role": "answer", "rle": encode_rle(answer)},
    ],
  }


@pytest.fixture
def data(tmp_path):
  path = tmp_path / "eval.tfrecord"
  with TFRecordWriter(path) as writer:
    writer.write(serialize_eval(record("a", "<script>alert(1)</script>")))
    writer.write(serialize_eval(record("b")))
  return path


def config(tmp_path, data, lines: list, **changes) -> ScoreConfig:
  file = tmp_path / "predictions.jsonl"
  file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
  return ScoreConfig(file, str(data), tmp_path / "out", **changes)


def test_json_lines_are_scored_and_reported(tmp_path, data):
  results = score(config(tmp_path, data, [prediction("b", right=False), prediction("a")]))
  assert results["metrics"]["reasoning_lq"] == 1.0 and results["metrics"]["answer_miou"] == 0.5
  saved = json.loads((tmp_path / "out" / "ver_evaluation_results.json").read_text())
  assert saved == results
  assert saved["detailed_results"][0]["ground_truth"]["answer_obj_ids"] == [5]
  assert saved["detailed_results"][0]["prediction"]["objects"][0]["phrase"] == "a box"
  page = (tmp_path / "out" / "report.html").read_text()
  assert "<script>alert(1)" not in page and "\\u003cscript>alert(1)" in page
  assert page.count("data:image/jpeg;base64,") == 1  # both questions are about one picture


def test_a_prepared_set_scores_as_its_files(tmp_path, data):
  lines = [prediction("b", right=False), prediction("a")]
  expected = score(config(tmp_path, data, lines))["metrics"]
  build(VrtEval, str(data), tmp_path / "sets")
  assert score(config(tmp_path, tmp_path / "sets", lines))["metrics"] == expected


def test_a_results_file_scores_to_itself(tmp_path, data):
  lines = [prediction("a"), prediction("b", right=False)]
  first = score(config(tmp_path, data, lines))
  path = tmp_path / "out" / "ver_evaluation_results.json"
  assert score(ScoreConfig(path, str(data), tmp_path / "again")) == first


@pytest.mark.parametrize("thinking", [True, False])
def test_a_results_file_of_the_reference(tmp_path, data, thinking):
  results = score(config(tmp_path, data, [prediction("a"), prediction("b", right=False)]))
  results["use_thinking"] = thinking
  for detail in results["detailed_results"]:
    del detail["prediction"]["objects"], detail["prediction"]["thinking"]
  path = tmp_path / "reference.json"
  path.write_text(json.dumps(results))
  again = score(ScoreConfig(path, str(data), tmp_path / "again"))
  assert again["metrics"] == results["metrics"]
  assert again["detailed_results"][0]["prediction"]["objects"][1]["object_number"] == 2


def test_against_another_model(tmp_path, data):
  worse = config(tmp_path, data, [prediction("a", right=False), prediction("b", right=False)])
  other = worse.predictions.rename(tmp_path / "other.jsonl")
  right = config(tmp_path, data, [prediction("a"), prediction("b")], against=other)
  results = score(right)
  found = results["comparison"]["differences"]["answer_miou"]
  assert found == {"mean": 1.0, "low": 1.0, "high": 1.0, "p_value": 2 / 2000}
  assert results["comparison"]["differences"]["reasoning_lq"]["p_value"] == 1.0
  assert "A-mIoU  +100.0 [+100.0, +100.0]  p = 0.001" in comparison_lines(results["comparison"])


def test_against_needs_the_same_questions(tmp_path, data):
  other = config(tmp_path, data, [prediction("a")]).predictions.rename(tmp_path / "other.jsonl")
  with pytest.raises(ValueError, match="1 of 2 samples have no prediction"):
    score(config(tmp_path, data, [prediction("a"), prediction("b")], against=other))
  with pytest.raises(ValueError, match="different questions"):
    score(config(tmp_path, data, [prediction("b")], against=other, subset=True))


def test_questions_about_one_picture_have_one_image_id(tmp_path, data):
  results = score(config(tmp_path, data, [prediction("a"), prediction("b")]))
  ids = {d["sample_info"]["image_id"] for d in results["detailed_results"]}
  assert len(ids) == 1 and len(ids.pop()) == 16  # both records have the same picture


def test_subset(tmp_path, data):
  with pytest.raises(ValueError, match="1 of 2 samples have no prediction"):
    score(config(tmp_path, data, [prediction("a")]))
  assert score(config(tmp_path, data, [prediction("a")], subset=True))["total_samples"] == 1


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ([], "no predictions"),
    (["{"], "line 1: not JSON"),
    (["[1]", "2"], "line 1: a prediction needs"),
    ([prediction("a"), {"key": "b", "text": ""}], "line 2: .* the field 'objects'"),
    ([prediction("a"), prediction("a")], "line 2: key 'a' is given twice"),
    ([prediction("a"), prediction("b"), prediction("c")], "1 predictions are not in the data"),
    ([prediction("a"), prediction("b") | {"objects": [3]}], "line 2: a prediction needs"),
    (
      [prediction("a"), prediction("b") | {"objects": [{"role": "answer", "rle": "x"}]}],
      "sample b: ",
    ),
    (
      [
        prediction("a"),
        prediction("b") | {"objects": [{"role": "answer", "rle": encode_rle(np.ones((3, 3)))}]},
      ],
      "sample b: mask size: ",
    ),
  ],
)
def test_bad_input_raises_one_clear_line(tmp_path, data, lines, message):
  with pytest.raises(ValueError, match=message) as error:
    score(config(tmp_path, data, lines))
  assert "\n" not in str(error.value)


def test_pretty_printed_json_is_not_taken_for_results(tmp_path):
  path = tmp_path / "x.json"
  path.write_text(json.dumps({"key": 3}, indent=2))
  with pytest.raises(ValueError, match="line 1: not JSON"):
    load_predictions(path)


def test_command_line_exit_status(tmp_path, data):
  command = [sys.executable, "-m", "eval.score", "--data", str(data), "--out", str(tmp_path / "o")]
  bad = subprocess.run(
    [*command, "--predictions", str(tmp_path / "none.jsonl")], capture_output=True, text=True
  )
  assert bad.returncode == 1 and bad.stderr.startswith("error: ")
  assert "Traceback" not in bad.stderr
  settings = config(tmp_path, data, [prediction("a"), prediction("b")])
  good = subprocess.run(
    [*command, "--predictions", str(settings.predictions)], capture_output=True, text=True
  )
  assert good.returncode == 0 and "R-LQ 100.0" in good.stdout


def test_report_without_images(tmp_path, data):
  results = score(config(tmp_path, data, [prediction("a"), prediction("b")]))
  page = write_report(results, tmp_path / "plain").read_text()
  assert "data:image/jpeg" not in page and "95 %: " in page
