"""Ways to earn without answering: none pays more than an honest answer, crashes or is slow."""

import time

import numpy as np
import pytest

from tests.rl.samples import FIRST, GOOD_TEXT, SECOND, honest, logits, sample
from vrt_jax.config import GrpoConfig
from vrt_jax.rl.rewards import Sample
from vrt_jax.rl.scoring import Reward

MAX_MASKS = 32
DEFAULT = Reward(GrpoConfig(trace_weight=1.0))
REFERENCE = Reward(GrpoConfig(trace_weight=1.0, matching="reference"))
THINK, ANSWER = GOOD_TEXT.split("<answer>")[0], "<answer>b [SEG].</answer>"
SHOT = "<think>[SEG]</think><answer>" + "[SEG]" * 400 + "</answer>"
WHOLE, EMPTY = (0, 256), (0, 0)


def repeated_answer() -> Sample:
  """The right mask again and again."""
  text = THINK + "<answer>" + "b [SEG] " * 6 + "</answer>"
  return sample(text, (22, 80), (150, 176), *[(150, 176)] * 6)


def repeated_reasoning() -> Sample:
  text = "<think>" + "a [SEG] " * 5 + "b [SEG]</think>" + ANSWER
  return sample(text, *[(22, 80)] * 5, (150, 176), (150, 176))


def hundreds_of_masks() -> Sample:
  """The picture in strips, one of which will fit; only the first have masks."""
  spans = [SECOND, *[(8 * i, 8 * i + 8) for i in range(MAX_MASKS - 1)]]
  return sample(SHOT, *spans, num_tokens=1024)


def masks_beyond_the_limit() -> Sample:
  """The answer comes after so many masks that it has none."""
  text = "<think>" + "[SEG]" * 400 + "</think><answer>[SEG]</answer>"
  return sample(text, *[FIRST] * MAX_MASKS)


def answer_tag_inside_think() -> Sample:
  """All evidence is offered as an answer too."""
  text = "<think><answer>a [SEG] b [SEG]</think><answer>b [SEG]</answer>"
  return sample(text, (22, 80), (150, 176), (150, 176))


def answer_inside_think() -> Sample:
  text = "<think>a [SEG] <answer>b [SEG]</answer></think><answer>b [SEG]</answer>"
  return sample(text, (22, 80), (150, 176), (150, 176))


def spelled_seg() -> Sample:
  """[SEG] written with other tokens gives the evidence's mask the role of the answer."""
  text = "<think>[SEG]</think><answer>[SEG]</answer>"
  return sample(text, (150, 176), (150, 176), num_segs=1)


HACKS = {
  "repeated answer": repeated_answer(),
  "repeated reasoning": repeated_reasoning(),
  "hundreds of masks": hundreds_of_masks(),
  "masks beyond the limit": masks_beyond_the_limit(),
  "answer tag inside think": answer_tag_inside_think(),
  "answer inside think": answer_inside_think(),
  "spelled [SEG]": spelled_seg(),
  "two answers": honest(GOOD_TEXT + "<answer>[SEG]</answer>"),
  "empty masks": sample(GOOD_TEXT, EMPTY, EMPTY, EMPTY),
  "whole pictures": sample(GOOD_TEXT, WHOLE, WHOLE, WHOLE),
  "no mask at all": sample(GOOD_TEXT),
  "never stops": honest(GOOD_TEXT.removesuffix("<|im_end|>") + " b" * 4000, truncated=True),
  "never answers": honest("<think>" + "a [SEG] " * 2000, truncated=True),
  "tags alone": sample("<think>" * 500 + "<answer>" * 500 + "</answer>" * 500),
  "nothing": sample(""),
}


@pytest.mark.parametrize("name", HACKS)
def test_earns_less_than_an_honest_answer(name: str):
  assert DEFAULT.score(HACKS[name]).total < DEFAULT.score(honest()).total - 0.09


@pytest.mark.parametrize("name", HACKS)
def test_the_reference_rules_take_it_too(name: str):
  """No crash; two things pay as much as an honest answer there (docs/rl.md)."""
  earned, fair = REFERENCE.score(HACKS[name]).total, REFERENCE.score(honest()).total
  if name == "never stops":
    assert earned == fair
  elif name != "spelled [SEG]":
    assert earned < fair


def test_whole_pictures_where_the_answer_is_large():
  """More than half of the picture is the answer: the whole picture is a fair, bad answer."""
  large = {"answer_masks": (logits((0, 150)) > 0).astype(np.uint8)}
  whole = sample(GOOD_TEXT, WHOLE, WHOLE, WHOLE, **large)
  good = sample(GOOD_TEXT, FIRST, (0, 145), (0, 145), **large)
  assert DEFAULT.score(whole).total < DEFAULT.score(good).total - 0.3


def test_a_whole_picture_hides_nothing_of_the_others():
  """The union of all objects is no answer to one of them."""
  union = sample(GOOD_TEXT, FIRST, SECOND, (FIRST[0], SECOND[1]))
  assert DEFAULT.score(union).terms["answer"] == 0.0


def seconds(one: Sample) -> float:
  """The least of some times, of one score."""
  times = []
  for _ in range(5):
    start = time.perf_counter()
    DEFAULT.score(one)
    times.append(time.perf_counter() - start)
  return min(times)


@pytest.mark.parametrize("name", HACKS)
def test_scoring_takes_no_longer_than_that_of_as_many_honest_masks(name: str):
  text = GOOD_TEXT.replace("b (<ver><obj2> [SEG]</ver>)", "b [SEG]" * (MAX_MASKS - 2))
  full = sample(text, *[FIRST] * MAX_MASKS)
  assert seconds(HACKS[name]) < 3 * seconds(full) + 0.01
