"""Generating and scoring VRT-Eval records with one command."""

import json

import numpy as np
import pytest

from eval import vrt_bench
from tests import tiny
from vrt_jax import evaluate, model_directory
from vrt_jax.config import EvalConfig
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import TFRecordWriter, serialize_eval
from vrt_jax.data.trace import mentions
from vrt_jax.generate.predictor import Prediction


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
