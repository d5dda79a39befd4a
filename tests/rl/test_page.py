"""The page of rollouts: what it shows, escaping, and that it needs nothing from outside."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from tests.rl.samples import FIRST, GOOD_TEXT, SECOND, SIZE, honest, sample, strips
from vrt_jax.config import GrpoConfig
from vrt_jax.data.trace import mentions
from vrt_jax.rl.groups import Groups
from vrt_jax.rl.page import NUM_GROUPS, coloured_text, picture_of, shown_samples, write_page
from vrt_jax.rl.rewards import Sample
from vrt_jax.rl.scoring import Reward
from vrt_jax.text_panel import object_colours
from vrt_jax.types import PromptTruth

GRPO = GrpoConfig(group_size=3)


def groups(count: int, members: list[Sample]) -> Groups:
  truths = tuple(
    PromptTruth(f"key_{i}", f"Which <b>{i}?", (200, 400), strips(SECOND), strips(FIRST, SECOND))
    for i in range(count)
  )
  scores = [Reward(GRPO).score(s) for s in members]
  return Groups(truths, [members] * count, [scores] * count, {})


def page(tmp_path: Path, count: int, members: list[Sample]) -> str:
  pictures = np.full((count, 64, 64, 3), 90, np.uint8)
  path = tmp_path / "rollouts" / "step_5.html"
  write_page(path, "Step 5", pictures, groups(count, members), GRPO)
  assert list(path.parent.iterdir()) == [path]
  return path.read_text()


MEMBERS = [sample("no <script>alert(1)</script>", truncated=True), honest(), sample(GOOD_TEXT)]


def test_a_group_side_by_side(tmp_path: Path):
  text = page(tmp_path, 1, MEMBERS)
  assert text.count('class="sample') - text.count('class="samples') == 3
  cards = re.split(r'<div class="sample(?= best"|")', text)[1:]
  assert [card.startswith(' best"') for card in cards] == [False, True, False]
  assert "advantage +" in cards[1] and "advantage -" in cards[0]
  assert "<td>format</td><td>1.000</td>" in cards[1]
  assert "<td>reward</td><td>1.867</td>" in cards[1]
  assert "truncated" in cards[0] and "truncated" not in cards[1]
  assert "Which &lt;b&gt;0?" in text
  assert "evidence (2)" in text and "answer (1)" in text


def test_everything_is_escaped_and_inside(tmp_path: Path):
  text = page(tmp_path, 1, MEMBERS)
  assert "<script" not in text
  assert "&lt;script&gt;" in text
  sources = re.findall(r'src="([^"]+)"', text)
  assert len(sources) == 3 + 3
  assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
  assert "http" not in text and "url(" not in text


def test_masks_are_painted(tmp_path: Path):
  text = page(tmp_path, 1, MEMBERS)
  data = re.findall(r"base64,([^\"]+)", text)
  plain, evidence, answer, none, good, _ = (
    np.asarray(Image.open(io.BytesIO(base64.b64decode(d)))).astype(int) for d in data
  )
  assert plain.shape == (180, 360, 3)  # proportions of the picture, not of SAM 2's square

  def painted(picture: np.ndarray, span: tuple[int, int]) -> bool:
    column = round(sum(span) / 2 / SIZE * 360)
    return bool(np.abs(picture - plain)[90, column].max() > 20)

  assert [painted(evidence, s) for s in (FIRST, SECOND)] == [True, True]
  assert [painted(answer, s) for s in (FIRST, SECOND)] == [False, True]
  assert [painted(good, s) for s in (FIRST, SECOND)] == [True, True]
  assert [painted(none, s) for s in (FIRST, SECOND)] == [False, False]


def test_words_and_masks_share_their_colour():
  found = mentions(GOOD_TEXT)
  shown = coloured_text(GOOD_TEXT, found, object_colours(found))
  colours = re.findall(r'class="phrase" style="color:(#\w+)"', shown)
  assert len(colours) == 3
  assert colours[1] == colours[2] != colours[0]  # <obj2> in reasoning and answer
  assert "<ver>" not in shown
  assert re.sub("<[^>]*>", "", shown).count("[SEG]") == 3


def test_only_some_groups_and_samples(tmp_path: Path):
  text = page(tmp_path, NUM_GROUPS + 3, MEMBERS)
  assert text.count("<section>") == NUM_GROUPS
  assert shown_samples([0.0, 1.0, 2.0]) == [0, 1, 2]
  many = [float(i % 7) for i in range(16)]
  chosen = shown_samples(many)
  assert len(chosen) == 8
  assert {6, 13} <= set(chosen) and {0, 7, 14} <= set(chosen)  # the best and the worst


def test_a_picture_as_a_line():
  assert picture_of(np.zeros((8, 8, 3), np.uint8), (1, 5000)).size == (360, 1)


def test_hundreds_of_segs_and_empty_masks_do_not_stop_it(tmp_path: Path):
  odd = sample("[SEG] " * 500, *[(0, 0)] * 12, *[(0, SIZE)] * 2)
  assert "14 masks" in page(tmp_path, 1, [odd, honest(), honest()])
