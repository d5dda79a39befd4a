"""The report in a browser: filters, keys, masks and mentions that light up together."""

import numpy as np
import pytest

from eval.report import error_kinds, write_report
from tests.browser import chromium, opened
from tests.pictures import encoded, picture
from vrt_jax.metrics import PredictedMask, SampleResult, score_samples

SIZE = (120, 200)
TEXT = (
  "<think>See the left box (<ver><obj1> [SEG]</ver>).</think>\n\n"
  "<answer>The right box (<vea><obj2> [SEG]</vea>).</answer><|im_end|>"
)


def block(left: int, right: int) -> np.ndarray:
  mask = np.zeros(SIZE, bool)
  mask[30:90, left:right] = True
  return mask


LEFT, RIGHT, MIDDLE, HALF = block(20, 60), block(140, 180), block(90, 110), block(140, 160)


def sample(key: str, question: str, evidence: np.ndarray, answer: np.ndarray, **changes):
  spans = [TEXT.index("the left box"), TEXT.index("The right box")]
  objects = [
    PredictedMask(evidence, "reasoning", 0, "the left box", (spans[0], spans[0] + 32), 1),
    PredictedMask(answer, "answer", 1, "The right box", (spans[1], spans[1] + 33), 2),
  ]
  values = dict(text=TEXT, class_ids=["#loc"], image_id="one", objects=objects)
  return SampleResult(
    key=key,
    question=question,
    image_size=SIZE,
    reasoning_gt=[LEFT],
    answer_gt=[RIGHT],
    **(values | changes),
  )


SAMPLES = [
  sample("good", "Where?", LEFT, RIGHT),
  sample("wrong", "<script>alert(1)</script><b>Which?</b>", LEFT, MIDDLE, class_ids=["#comp"]),
  sample("missed", "What?", MIDDLE, RIGHT),
  sample("poor", "Who?", LEFT, HALF, class_ids=["#comp", "#func"]),
  sample("silent", "Why?", LEFT, RIGHT, text="</script><img src=x onerror=alert(1)>", objects=[]),
]
KINDS = {
  "good": ["right"],
  "wrong": ["wrong answer"],
  "missed": ["missed evidence"],
  "poor": ["poor mask"],
  "silent": ["invalid output", "wrong answer", "missed evidence"],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  images = {s.key: encoded(picture(SIZE[1], SIZE[0])) for s in SAMPLES}
  return write_report(score_samples(SAMPLES), tmp_path_factory.mktemp("report"), images)


@pytest.fixture(scope="module")
def browser():
  with chromium() as found:
    yield found


def keys(page) -> list[str]:
  return [item.split("\n")[0] for item in page.locator("#list li").all_inner_texts()]


def colour_at(page, stage: int, x: float, y: float) -> list[int]:
  """RGBA of a mask canvas at a place of the picture, in its pixels."""
  return page.evaluate(
    "([n, x, y]) => [...document.querySelectorAll('.stage canvas')[n].getContext('2d')"
    ".getImageData(x, y, 1, 1).data]",
    [stage, x, y],
  )


def test_kinds_of_errors():
  details = score_samples(SAMPLES)["detailed_results"]
  assert {d["sample_info"]["key"]: error_kinds(d) for d in details} == KINDS
  extra = sample("extra", "?", LEFT, RIGHT)
  extra.objects.append(PredictedMask(MIDDLE, "answer", 2))
  assert error_kinds(score_samples([extra])["detailed_results"][0]) == ["extra masks"]


def test_worst_first_filters_and_search(report, browser):
  with opened(browser, report) as page:
    assert keys(page)[0] == "Why?" and keys(page)[-1] == "Where?"
    page.select_option("#order", "best")
    assert keys(page)[0] == "Where?"
    page.select_option("#order", "data")
    page.select_option("#tag", "#comp")
    assert keys(page) == ["<script>alert(1)</script><b>Which?</b>", "Who?"]
    page.select_option("#kind", "poor mask")
    assert keys(page) == ["Who?"]
    assert page.inner_text("#count") == "1 of 5"
    page.fill("#words", "nothing like it")
    assert keys(page) == [] and "No sample" in page.inner_text("#detail")
    page.select_option("#tag", "")
    page.select_option("#kind", "")
    page.fill("#words", "MISSED")
    assert keys(page) == ["What?"] and "missed evidence" in page.inner_text("#detail")


def test_texts_are_never_markup(report, browser):
  with opened(browser, report) as page:
    assert "</script><img src=x onerror=alert(1)>" in page.inner_text("#detail")
    assert page.locator("#detail .text img, #list b").count() == 0


def test_a_mention_lights_its_mask_and_a_mask_its_mention(report, browser):
  with opened(browser, report) as page:
    page.fill("#words", "good")
    mention = page.locator(".mention", has_text="left box")
    before = colour_at(page, 0, 40, 60), colour_at(page, 0, 160, 60)
    assert before[0][3] > 50 and before[1][3] > 50 and colour_at(page, 0, 5, 5)[3] == 0
    mention.hover()
    assert "active" in mention.get_attribute("class")
    assert colour_at(page, 0, 40, 60)[3] > 50
    dark = colour_at(page, 0, 160, 60)
    assert dark == colour_at(page, 0, 5, 5) and dark[:3] == [0, 0, 0] and dark[3] > 50
    page.mouse.move(1, 1)
    assert colour_at(page, 0, 160, 60) == before[1]
    canvas = page.locator(".stage canvas").first
    box = canvas.bounding_box()
    canvas.hover(position={"x": 160 / 200 * box["width"], "y": 60 / 120 * box["height"]})
    assert page.locator(".mention.active").inner_text().startswith("The right box")
    canvas.hover(position={"x": 3, "y": 3})
    assert page.locator(".mention.active").count() == 0


def test_true_masks_stand_beside_with_their_ious(report, browser):
  with opened(browser, report) as page:
    page.fill("#words", "poor")
    assert page.locator(".ious li").all_inner_texts() == ["evidence IoU 1.00", "answer IoU 0.50"]
    assert page.locator(".ious li.miss").count() == 1
    assert page.locator(".stage canvas").count() == 2
    assert colour_at(page, 0, 170, 60)[3] == 0 < colour_at(page, 1, 170, 60)[3]


def test_the_keyboard_is_enough(report, browser):
  with opened(browser, report) as page:
    page.focus("#list")
    for press, question in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 4)):
      page.keyboard.press(press)
      chosen = page.locator("#list li[aria-selected=true]")
      assert chosen.count() == 1
      assert chosen.evaluate("e => [...e.parentNode.children].indexOf(e)") == question
    page.keyboard.press("Tab")
    while "mention" not in (page.evaluate("document.activeElement.className") or ""):
      page.keyboard.press("Tab")
    assert page.locator(".mention.active").count() == 1
    assert page.locator(".stage canvas").first.get_attribute("data-active") == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(report, browser, scheme):
  with opened(browser, report, width=360, height=740, color_scheme=scheme) as page:
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#list li").first.click()
    assert page.locator("#detail h3").bounding_box()["width"] <= 360
