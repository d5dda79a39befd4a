"""From a picture and a question to text and masks, against a PyTorch Sa2VA made of transformers.

The grounding image is 1024 pixels wide, as in the released models, so that masks take the real
road: 256 -> 1024 -> (height, width).
"""

from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.parity.errors import max_error, unit_error
from tests.parity.sa2va_case import MAX_MASKS, NEW_TOKENS, Case, Results, answer
from tests.pictures import encoded, picture
from vrt_jax.data.records import read_eval_records
from vrt_jax.generate.predictor import Request


def synthetic_case(folder: Path) -> Case:
  """Two noisy pictures of different sizes, with a small tokenizer."""
  questions = [tiny.eval_record(i).question for i in range(2)]
  pictures = [picture(150, 90), picture(310, 430, seed=1)]
  requests = [Request(encoded(p), q) for p, q in zip(pictures, questions, strict=True)]
  tiny.tokenizer().save(folder)
  return Case(folder, requests, seed=13, seg_gain=2.0)


def photograph_case(shared_data: Path) -> Case:
  """Two photographs of different sizes, with the real tokenizer."""
  records = list(read_eval_records(str(shared_data / "photos/photos_eval.tfrecord")))
  requests = [Request(records[i].image, records[i].question) for i in (3, 0)]
  return Case(shared_data / "qwen3-tokenizer", requests, seed=4, seg_gain=7.0)


@pytest.fixture(scope="module", params=["synthetic", "photographs"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
  if request.param == "photographs":
    return answer(photograph_case(request.getfixturevalue("shared_data")))
  return answer(synthetic_case(tmp_path_factory.mktemp("tokenizer")))


def test_greedy_tokens_are_the_same(results):
  for theirs, tokens, length in zip(
    results.references, results.generation.tokens, results.generation.lengths, strict=True
  ):
    assert length == NEW_TOKENS
    assert tokens.tolist() == theirs.tokens
    assert len(set(theirs.tokens)) > 15
  assert results.references[0].tokens != results.references[1].tokens


@pytest.mark.parametrize("missing", ["no rope delta", "no first resize"])
def test_other_tokens_with_a_part_left_out(results, missing):
  right = np.array([theirs.tokens for theirs in results.references])
  assert np.mean(results.wrong_tokens[missing] != right) > 0.3


def test_seg_states(results):
  for theirs, ours in zip(results.references, results.seg_states, strict=True):
    assert 3 < len(theirs.seg_states) <= MAX_MASKS
    assert unit_error(ours, theirs.seg_states) < 1e-5


def test_low_resolution_masks(results):
  generation = results.generation
  for i, theirs in enumerate(results.references):
    count = len(theirs.seg_states)
    assert generation.num_segs[i] == count
    ours = generation.low_res_masks[i, :count]
    assert ours.shape == (count, 256, 256)
    assert max_error(generation.iou_pred[i, :count], theirs.iou) < 1e-5
    assert unit_error(ours, theirs.low_res_masks) < 1e-4
    assert unit_error(ours, theirs.post_norm_masks) > 0.1


def test_binary_masks_at_picture_size(results):
  for theirs, ours in zip(results.references, results.predictions, strict=True):
    assert ours.masks.shape == theirs.logits.shape
    assert (np.abs(theirs.logits) < 1e-3).mean() < 0.01  # all but these must agree
    differ = ours.masks != (theirs.logits > 0)
    assert np.abs(theirs.logits[differ]).max(initial=0) < 1e-3
    assert 0.05 < ours.masks.mean() < 0.95
    direct = ours.masks != (theirs.direct_logits > 0)
    assert (direct & (np.abs(theirs.logits) > 1e-3)).sum() > 100
