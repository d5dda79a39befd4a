"""The local web page: its protocol, its bounds, and the page in a browser."""

import base64
import http.client
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from tests.browser import chromium, opened
from tests.pictures import encoded, picture
from vrt_jax.data.image import decode_image
from vrt_jax.data.trace import mentions
from vrt_jax.generate.predictor import Request
from vrt_jax.generate.reasoner import Answer, load
from vrt_jax.serve import Answers, Refused, ServeSettings, is_own_host, make_server

TEXT = (
  "<think>A <b>box</b> (<ver><obj1> [SEG]</ver>).</think>\n\n"
  "<answer>The box (<vea><obj1> [SEG]</vea>).</answer><|im_end|>"
)
SETTINGS = ServeSettings(port=0, max_upload_bytes=400_000, max_pixels=100_000, max_waiting=1)
PICTURE = encoded(picture(80, 60))


class LeftHalf:
  """A reasoner without a model: every mask is the left half."""

  def __init__(self):
    self.asked = []
    self.go = threading.Event()
    self.go.set()
    self.started = threading.Event()

  def ask(self, image, question, *, thinking):
    picture = decode_image(image)
    self.started.set()
    assert self.go.wait(20)
    self.asked.append((question, thinking))
    masks = np.zeros((2, 60, 80), bool)
    masks[:, :, :40] = True
    return Answer(TEXT, mentions(TEXT), masks, [0.5, 0.5], False, picture, question)


@contextmanager
def running(reasoner):
  with make_server(Answers(reasoner, SETTINGS), SETTINGS) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def reasoner():
  return LeftHalf()


@pytest.fixture(scope="module")
def port(reasoner):
  with running(reasoner) as found:
    yield found


def ask(port, body=b"", method="POST", path="/predict", **headers):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
  connection.request(method, path, body, headers)
  response = connection.getresponse()
  content = response.read()
  connection.close()
  return response.status, content


def question(**changes) -> bytes:
  entry = {"image": base64.b64encode(PICTURE).decode(), "question": "Where?"} | changes
  return json.dumps({k: v for k, v in entry.items() if v is not None}).encode()


def test_an_answer_has_text_masks_and_the_picture(port, reasoner):
  status, content = ask(port, question(thinking=False))
  found = json.loads(content)
  assert status == 200 and found["text"] == TEXT
  assert [m["role"] for m in found["view"]["masks"]] == ["reasoning", "answer"]
  assert found["view"]["size"] == [60, 80] and found["picture"].startswith("data:image/jpeg")
  assert reasoner.asked[-1] == ("Where?", False)


def test_the_page_and_no_other(port):
  status, content = ask(port, method="GET", path="/")
  assert status == 200 and b"Ask about a picture" in content
  for path in ("/../../etc/passwd", "/viewer/trace.js", "/predict"):
    assert ask(port, method="GET", path=path)[0] == 404
  assert ask(port, question(), path="/other")[0] == 404
  assert ask(port, method="PUT", path="/")[0] == 501


@pytest.mark.parametrize(
  ("body", "status", "message"),
  [
    (b"", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b"[1]", 400, "needs a picture and a question"),
    (question(image=None), 400, "needs a picture and a question"),
    (question(question=7), 400, "needs a picture and a question"),
    (question(question="  "), 400, "needs a picture and a question"),
    (question(question="x" * 2001), 400, "longer than 2000"),
    (question(image="no base64!"), 400, "not base64"),
    (question(image="é"), 400, "not base64"),
    (question(image=base64.b64encode(b"GIF89a").decode()), 400, "cannot identify"),
    (question(image=base64.b64encode(PICTURE[:50]).decode()), 400, ""),
    (question(image=base64.b64encode(encoded(picture(400, 300))).decode()), 413, "pixels"),
    (b" " * 400_001, 413, "MiB"),
  ],
)
def test_bad_requests_get_one_line(port, reasoner, body, status, message):
  before = len(reasoner.asked)
  got, content = ask(port, body)
  error = json.loads(content)["error"]
  assert got == status and message in error
  assert error and "\n" not in error and "Traceback" not in error
  assert len(reasoner.asked) == before


def test_the_length_must_be_given(port):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
  connection.putrequest("POST", "/predict")
  connection.endheaders()
  assert connection.getresponse().status == 411
  connection.close()
  assert ask(port, **{"Content-Length": "-1"})[0] == 411
  assert ask(port, **{"Content-Length": "9" * 30})[0] == 413


def test_pages_of_other_servers_may_not_ask(port):
  good = f"127.0.0.1:{port}"
  assert ask(port, question(), Origin=f"http://{good}")[0] == 200
  assert ask(port, question(), Origin="http://evil.example")[0] == 403
  assert ask(port, question(), Origin="null")[0] == 403
  assert ask(port, question(), Host="evil.example")[0] == 403
  assert ask(port, method="GET", path="/", Host=f"evil.example:{port}")[0] == 403


def test_own_names():
  for host in ("127.0.0.1:80", "localhost", "LOCALHOST:9", "[::1]:8000", "127.0.0.2"):
    assert is_own_host(host, "127.0.0.1"), host
  for host in ("", "10.0.0.5:80", "localhost.evil.example", "127.0.0.1.evil.example:80"):
    assert not is_own_host(host, "127.0.0.1"), host
  assert is_own_host("10.0.0.5:80", "0.0.0.0") and not is_own_host("evil.example", "0.0.0.0")


def test_too_many_questions_are_refused(port, reasoner):
  reasoner.go.clear()
  reasoner.started.clear()
  first = []
  thread = threading.Thread(target=lambda: first.append(ask(port, question())))
  thread.start()
  assert reasoner.started.wait(20)
  status, content = ask(port, question())
  reasoner.go.set()
  thread.join()
  assert status == 503 and "waiting" in json.loads(content)["error"]
  assert first[0][0] == 200
  assert ask(port, question())[0] == 200


def test_a_question_that_fails_does_not_block_the_next(port, reasoner, monkeypatch):
  def fail(image, question, *, thinking):
    raise ValueError("the prompt\nis too long")

  with monkeypatch.context() as patch:
    patch.setattr(reasoner, "ask", fail)
    status, content = ask(port, question())
  assert (status, json.loads(content)) == (400, {"error": "the prompt is too long"})
  assert ask(port, question())[0] == 200


def test_the_page_in_a_browser(port, tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(PICTURE)
  with chromium() as browser, opened(browser, f"http://127.0.0.1:{port}/") as page:
    page.set_input_files("#image", path)
    assert page.inner_text("#name") == "photo.png"
    page.fill("#question", "Where is <i>it</i>?")
    page.click("#ask")
    page.wait_for_selector(".mention")
    assert "2 masks" in page.inner_text("#status")
    assert "A <b>box</b>" in page.inner_text(".text") and page.locator(".text b").count() == 0
    page.locator(".mention").first.hover()
    assert page.locator(".stage canvas").get_attribute("data-active") == "0"
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_says_what_is_wrong(reasoner, tmp_path, monkeypatch):
  def refuse(image, question, *, thinking):
    raise Refused(503, "too many questions are waiting")

  monkeypatch.setattr(reasoner, "ask", refuse)
  path = tmp_path / "photo.png"
  path.write_bytes(PICTURE)
  with running(reasoner) as port, chromium() as browser:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.set_input_files("#image", path)
    page.fill("#question", "Where?")
    page.click("#ask")
    page.wait_for_selector("#status.error")
    assert page.inner_text("#status") == "too many questions are waiting"
    assert page.is_enabled("#ask")


def test_the_shapes_model_answers():
  answers = Answers(load("shapes", max_new_tokens=48), ServeSettings())
  found = answers.answer(Request(PICTURE, "Where is the red circle?"), thinking=True)
  assert found["text"].startswith("<think>") and found["view"]["size"] == [60, 80]
