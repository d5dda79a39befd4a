"""Requests to an endpoint that fails in every way, and a key that must not show."""

import asyncio
import datetime
import doctest
import email.utils
import itertools
import logging
import time
import traceback
from collections.abc import Callable

import pytest

from eval.api import client as client_module
from eval.api.client import (
  Answer,
  ApiKey,
  ChatClient,
  EndpointRefused,
  QuestionFailed,
  check_base_url,
  parse_answer,
  retry_after_s,
)
from tests.eval.api.fake_server import KEY, Asked, FakeServer, Reply, completion, serve

GOOD = completion("a key", 11, 7)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
  monkeypatch.setenv("TEST_KEY", KEY)


def ask(url: str, times: int = 1, **options: object) -> list[Answer]:
  """The answers to equal requests that are sent at once."""

  async def run() -> list[Answer]:
    settings = {"timeout_s": 5.0, "retries": 2, "concurrency": times} | options
    async with ChatClient(url, ApiKey("TEST_KEY"), **settings) as client:
      return await asyncio.gather(*[client.ask({"model": "m"}) for _ in range(times)])

  return asyncio.run(run())


def replies(*sequence: Reply) -> Callable[[Asked], Reply]:
  """An answer function that gives one reply after the other, the last for ever."""
  left = list(sequence)
  return lambda asked: left.pop(0) if len(left) > 1 else left[0]


def failure(*sequence: Reply, kind: type[Exception] = QuestionFailed, **options: object) -> str:
  with serve(replies(*sequence)) as server, pytest.raises(kind) as error:
    ask(server.url, **options)
  return str(error.value)


def test_a_request_and_its_answer():
  with serve(replies(GOOD)) as server:
    assert ask(server.url + "/") == [Answer("a key", "stop", "fake-1", 11, 7)]
  (asked,) = server.asked
  assert asked.path == "/v1/chat/completions" and asked.body == {"model": "m"}
  assert asked.headers["authorization"] == f"Bearer {KEY}"


def test_without_a_key_no_header_is_sent(monkeypatch):
  monkeypatch.delenv("TEST_KEY")
  with serve(replies(GOOD)) as server:
    ask(server.url)
  assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
  "bad",
  [
    Reply({"error": "busy"}, 500),
    Reply(b"<html>bad gateway</html>", 502),
    Reply({}, 429),
    Reply({}, 408),
    Reply(b"not json"),
    Reply(b"[" * 100_000),
    Reply({"choices": []}),
    Reply({"error": {"message": "upstream"}}),
    Reply(b"\xff\xfe", headers={"Content-Encoding": "gzip"}),
    Reply(b"", headers={"Content-Length": "50"}),
  ],
)
def test_what_may_pass_is_asked_again(bad):
  with serve(replies(bad, bad, GOOD)) as server:
    if bad.headers.get("Content-Length"):
      ask(server.url, timeout_s=0.2)
    else:
      ask(server.url)
  assert len(server.asked) == 3


def test_attempts_are_counted():
  with serve(replies(Reply({"error": {"message": "busy\nnow"}}, 503))) as server:
    with pytest.raises(QuestionFailed, match=r"HTTP 503: busy now \(after 4 attempts\)"):
      ask(server.url, retries=3)
  assert len(server.asked) == 4


def test_waits_grow(monkeypatch):
  monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.04)
  with serve(replies(Reply({}, 500))) as server, pytest.raises(QuestionFailed):
    ask(server.url, retries=3)
  at = [asked.at for asked in server.asked]
  waits = [b - a for a, b in itertools.pairwise(at)]
  assert waits[0] >= 0.02 and waits[1] >= 0.04 and waits[2] >= 0.08


def test_timeout_of_an_attempt_as_a_whole():
  slow = Reply(GOOD.body, delay_s=0.3)
  with serve(replies(slow, GOOD)) as server:
    assert ask(server.url, timeout_s=0.1)[0].text == "a key"
  assert "no answer within 0.05 s" in failure(slow, timeout_s=0.05, retries=0)


def test_a_server_that_is_not_there():
  with serve(replies(GOOD)) as server:
    pass
  with pytest.raises(QuestionFailed, match=r"ConnectError: .* \(after 3 attempts\)"):
    ask(server.url)


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_all_questions(as_date):
  limited = []

  def answer(asked: Asked) -> Reply:
    if limited:
      return GOOD
    limited.append(asked.at)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    header = email.utils.format_datetime(soon, usegmt=True) if as_date else "0.3"
    return Reply({}, 429, {"Retry-After": header})

  async def run(server: FakeServer) -> None:
    async with ChatClient(
      server.url, ApiKey("TEST_KEY"), timeout_s=5.0, retries=2, concurrency=2
    ) as client:
      first = asyncio.create_task(client.ask({}))
      while not limited:
        await asyncio.sleep(0.005)
      await asyncio.sleep(0.05)  # the reply has arrived
      await asyncio.gather(first, client.ask({}))

  with serve(answer) as server:
    asyncio.run(run(server))
  waits = [asked.at - limited[0] for asked in server.asked[1:]]
  assert len(waits) == 2 and min(waits) >= (0.9 if as_date else 0.3)


def test_a_server_that_asks_for_an_hour():
  start = time.monotonic()
  message = failure(Reply({}, 429, {"Retry-After": "3600"}))
  assert "asks to wait 3600 s" in message and time.monotonic() - start < 2


@pytest.mark.parametrize(
  ("header", "seconds"),
  [("", None), ("soon", None), ("nan", None), ("-3", 0.0), ("7", 7.0)],
)
def test_retry_after_of_any_form(header, seconds):
  assert retry_after_s(header) == seconds


def test_what_will_not_pass_is_asked_once():
  with serve(replies(Reply({"error": {"message": "image too large"}}, 400))) as server:
    with pytest.raises(QuestionFailed, match=r"^HTTP 400: image too large$"):
      ask(server.url)
  assert len(server.asked) == 1
  moved = failure(Reply(b"", 307, {"Location": "http://127.0.0.1:9/"}))
  assert moved.startswith("HTTP 307")  # the key goes to no other host


@pytest.mark.parametrize("status", [401, 402, 404])
def test_what_every_question_would_get_ends_the_run(status):
  message = failure(Reply({"error": {"message": "no"}}, status), kind=EndpointRefused)
  assert f"HTTP {status}" in message


@pytest.mark.parametrize(
  ("content", "text"),
  [
    ("a", "a"),
    (None, ""),
    ([{"type": "text", "text": "a"}, {"type": "image"}, "b", {"text": "c"}], "ac"),
    ("a\ud800", "a?"),
  ],
)
def test_contents_of_a_message(content, text):
  assert parse_answer(completion(content).body).text == text


def test_servers_that_count_no_tokens():
  body = completion("a").body | {"usage": None}
  assert parse_answer(body) == Answer("a", "stop", "fake-1", None, None)
  strange = {"prompt_tokens": "12", "completion_tokens": -1}
  assert parse_answer(body | {"usage": strange}).input_tokens is None


def test_examples_of_the_docstrings():
  assert doctest.testmod(client_module).failed == 0


def echo(status: int, form: str) -> Callable[[Asked], Reply]:
  """A server that sends the headers of a request back."""

  def answer(asked: Asked) -> Reply:
    auth = asked.headers["authorization"]
    bodies = {
      "message": {"error": {"message": f"bad header {auth}"}},
      "other": {"detail": {"headers": {"authorization": auth}}},
      "plain": f"{'x' * 285} {auth}".encode(),  # the message is cut within the key
      "escaped": b'{"error": {"message": "' + auth.replace("/", "\\/").encode() + b'"}}',
      "cut": {"error": {"message": f"got {auth[:30]}.."}},
      "answer": completion(f"my key is {auth}").body,
    }
    return Reply(bodies[form], status, {"X-Echo": auth})

  return answer


def assert_hidden(*texts: str) -> None:
  assert not any(KEY[i : i + 12] in text for text in texts for i in range(len(KEY) - 11))
  assert not any(KEY[:6] in text for text in texts)


@pytest.mark.parametrize("form", ["message", "other", "plain", "escaped", "cut"])
@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_the_key_is_in_no_error_and_no_log(status, form, caplog):
  caplog.set_level(logging.DEBUG)
  with serve(echo(status, form)) as server, pytest.raises(ValueError) as error:
    ask(server.url, retries=1)
  assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
  whole = "".join(traceback.format_exception(error.value))
  assert_hidden(str(error.value), repr(error.value), whole, caplog.text)
  if status in (400, 404):
    assert "[key]" in str(error.value) or form == "plain"


def test_the_key_is_in_no_header_line_of_an_error(caplog):
  """The client quotes header lines that it cannot read."""

  def answer(asked: Asked) -> Reply:
    return Reply({}, 200, {f"Bad {asked.headers['authorization']}\x01": "x"})

  caplog.set_level(logging.DEBUG)
  with serve(answer) as server, pytest.raises(QuestionFailed, match="RemoteProtocolError") as error:
    ask(server.url, retries=0)
  assert_hidden(str(error.value), caplog.text)


def test_the_key_is_in_no_answer():
  with serve(echo(200, "answer")) as server:
    (answer,) = ask(server.url)
  assert answer.text == "my key is Bearer [key]"


def test_the_key_is_in_no_repr():
  key = ApiKey("TEST_KEY")
  client = ChatClient("http://127.0.0.1:9/v1", key, timeout_s=1, retries=0, concurrency=1)
  assert repr(key) == "ApiKey(TEST_KEY)" and bool(key)
  assert_hidden(repr(client), str(vars(client)), f"{key} {key!r}", repr(client._client.headers))
  with pytest.raises(TypeError):
    vars(key)


def test_a_key_that_no_header_can_carry(monkeypatch):
  for bad in (f"{KEY}\nX: 1", f"{KEY}\u00e4"):
    monkeypatch.setenv("TEST_KEY", bad)
    with pytest.raises(ValueError, match="the key in TEST_KEY has characters") as error:
      ApiKey("TEST_KEY")
    assert_hidden(str(error.value))


def test_placeholders_of_local_servers_are_no_secrets(monkeypatch):
  monkeypatch.setenv("TEST_KEY", "x")
  assert ApiKey("TEST_KEY").redact("box [1, 2]") == "box [1, 2]"


@pytest.mark.parametrize(
  "url", ["", "host/v1", "ftp://host/v1", "https://me:pw@host/v1", "https://host/v1?key=1"]
)
def test_addresses_that_are_refused(url):
  with pytest.raises(ValueError, match="--base-url must") as error:
    check_base_url(url)
  assert "pw" not in str(error.value)
