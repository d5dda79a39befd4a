"""The results file."""

import json

import numpy as np
import pytest

from vrt_jax.metrics import PredictedMask, SampleResult, score_samples, write_results
from vrt_jax.ops.masks import decode_rle, encode_rle

TEXT = "<think>a box (<ver><obj1> [SEG]</ver>)</think>\n\n<answer>it [SEG]</answer><|im_end|>"


def half(left: bool) -> np.ndarray:
  mask = np.zeros((6, 8), bool)
  mask[:, :4] = left
  mask[:, 4:] = not left
  return mask


def sample(**changes) -> SampleResult:
  values = dict(
    key="a",
    question="which?",
    text=TEXT,
    image_size=(6, 8),
    reasoning_gt=[encode_rle(half(True))],
    answer_gt=[half(False)],
    objects=[
      PredictedMask(half(True), "reasoning", 0, "a box", (7, 12), 1, 0.9),
      PredictedMask(np.ones((6, 8)), "answer", 1),
      PredictedMask(half(True), "none", 2),
    ],
    class_ids=["#loc"],
    reasoning_obj_ids=[3],
    answer_obj_ids=[4],
  )
  return SampleResult(**(values | changes))


def test_schema_and_numbers():
  results = score_samples([sample()], "abc")
  metrics = results["metrics"]
  assert metrics["reasoning_lq"] == 1.0 and metrics["answer_miou"] == 0.5
  assert metrics["answer_lq"] == 0.0  # IoU is exactly 0.5
  assert results["precision"] == results["f1"] == {"reasoning": 1.0, "answer": 0.0}
  assert results["masks_per_sample"] == {"reasoning": 1.0, "answer": 1.0}
  assert results["invalid"] == 0.0 and results["config_hash"] == "abc"
  assert results["total_answer_masks_evaluated"] == 1 and results["raw_answer_ious"] == [0.5]
  assert results["per_cls_reasoning_ious"] == {"#loc": [1.0]}
  entry = results["detailed_results"][0]
  assert entry["sample_info"]["key"] == "a"
  assert entry["ground_truth"]["reasoning_obj_ids"] == [3]
  prediction = entry["prediction"]
  assert (prediction["num_pred_masks"], prediction["num_reasoning_masks"]) == (3, 1)
  assert (decode_rle(prediction["reasoning_masks_rle"][0]) == half(True)).all()
  assert prediction["objects"][0]["phrase"] == "a box"
  assert entry["evaluation"] == {"reasoning_miou": 1.0, "answer_miou": 0.5}
  assert json.loads(json.dumps(results)) == results


def test_invalid_outputs_are_counted_by_reason():
  cut = sample(text="<think>a [SEG]", objects=[])
  empty = sample(objects=[])
  bare = sample(text="it [SEG]", thinking=False)
  twice = sample(text=TEXT + "<answer>or it [SEG]</answer>")
  results = score_samples([sample(), cut, empty, bare, twice], "")
  assert results["invalid"] == 3 / 5
  assert results["invalid_reasons"] == {
    "no_answer_span": 1,
    "several_answer_spans": 1,
    "no_answer_mask": 1,
  }


def test_no_samples():
  results = score_samples([], "")
  assert results["metrics"]["reasoning_lq"] == 0.0 and results["invalid"] == 0.0


@pytest.mark.parametrize("field", ["reasoning_gt", "answer_gt", "objects"])
def test_masks_of_another_size_raise_with_the_key(field):
  wrong = np.ones((8, 6))
  value = [PredictedMask(wrong, "none")] if field == "objects" else [wrong]
  with pytest.raises(ValueError, match="sample a: mask size: "):
    score_samples([sample(**{field: value})], "")


def test_unknown_role_and_malformed_mask_raise():
  with pytest.raises(ValueError, match="sample a: role: 'x'"):
    score_samples([sample(objects=[PredictedMask(half(True), "x")])], "")
  with pytest.raises(ValueError, match="sample a: RLE: "):
    score_samples([sample(answer_gt=[{"size": [6, 8], "counts": "!"}])], "")


def test_written_whole_or_not_at_all(tmp_path):
  path = write_results(score_samples([sample()], "x"), tmp_path / "out")
  assert path.name == "ver_evaluation_results.json"
  first = json.loads(path.read_text())
  with pytest.raises(ValueError):
    write_results({"bad": float("nan")}, tmp_path / "out")
  assert json.loads(path.read_text()) == first
  assert [p.name for p in path.parent.iterdir()] == [path.name]
