"""Outputs that are no traces: they are counted, and nothing breaks."""

import numpy as np
import pytest

from vrt_jax.data.trace import mentions, seg_roles
from vrt_jax.metrics import PredictedMask, SampleResult, score_samples, write_results
from vrt_jax.metrics.results import INVALID_REASONS

COUNT, AT_ONCE = 10_000, 500
PIECES = (
  *("<think>", "</think>", "<answer>", "</answer>", "<ver>", "</ver>", "<vea>", "</vea>"),
  *("<p>", "</p>", "<obj1>", "<obj99999999999999999999>", "<obj>", "[SEG]", "[SEG", "SEG]", "<"),
  *("a box", " ", "\n", "\0", "\u202e", "é", "\ud800", "𝄞", "<|im_end|>", "(", "].*+?^$\\"),
)
MASK = np.ones((4, 4), bool)


def garbage(rng: np.random.Generator) -> str:
  """Pieces of traces in any order, random characters, or random bytes as text."""
  kind = rng.integers(3)
  if kind == 0:
    return "".join(PIECES[i] for i in rng.integers(0, len(PIECES), rng.integers(0, 40)))
  if kind == 1:
    return "".join(chr(c) for c in rng.integers(0, 0x11000, rng.integers(0, 60)))
  return rng.bytes(int(rng.integers(0, 80))).decode("latin-1")


def result(text: str) -> SampleResult:
  """As the benchmark makes it: a mask for every [SEG] that the text has."""
  roles = {m.index: m.role for m in mentions(text)}
  objects = [PredictedMask(MASK, role, index) for index, role in sorted(roles.items())][:12]
  return SampleResult("k", "?", text, (4, 4), [MASK], [MASK], objects)


@pytest.mark.parametrize("start", range(0, COUNT, COUNT // 4))
def test_random_texts_are_scored_and_counted(start):
  rng = np.random.default_rng(start)
  for _ in range(COUNT // 4 // AT_ONCE):
    texts = [garbage(rng) for _ in range(AT_ONCE)]
    results = score_samples([result(text) for text in texts])
    counted = results["invalid_reasons"]
    assert sum(counted.values()) == round(results["invalid"] * AT_ONCE) > AT_ONCE / 2
    for text, detail in zip(texts, results["detailed_results"], strict=True):
      reasoning, answer = seg_roles(text)
      assert detail["error"] in ("", *INVALID_REASONS)
      assert detail["error"] or answer, text
      assert len(mentions(text)) == text.count("[SEG]") >= len(reasoning) + len(answer)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", "no_answer_span"),
    ("<think>a [SEG]", "no_answer_span"),
    ("<answer>a [SEG]", "no_answer_span"),
    ("</answer>[SEG]<answer>", "no_answer_span"),
    ("<answer></answer>[SEG]", "no_answer_mask"),
    ("<answer>a [SEG]</answer> <answer>b [SEG]</answer>", "several_answer_spans"),
    ("[SEG]" * 5000, "no_answer_span"),
    ("<answer>" + "[SEG]" * 5000 + "</answer>", ""),
    ("<answer>" * 3000 + "[SEG]" + "</answer>" * 3000, ""),
  ],
)
def test_each_kind_has_its_reason(text, reason):
  detail = score_samples([result(text)])["detailed_results"][0]
  assert detail["error"] == reason


def test_half_characters_can_be_saved(tmp_path):
  results = score_samples([result("a \ud800 b")])
  assert "a ? b" in write_results(results, tmp_path).read_text()
