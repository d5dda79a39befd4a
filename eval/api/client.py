"""Questions to an OpenAI-compatible endpoint: retries, and a key that nothing shows."""

import asyncio
import email.utils
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from eval.boxes import writable

FIRST_WAIT_S = 1.0
"""Before the first repetition; doubled for each further one."""
MAX_WAIT_S = 60.0
MAX_RETRY_AFTER_S = 600.0
"""A server that asks to wait longer is not waited for."""
CHARACTERS_OF_AN_ERROR = 300
SHORTEST_SECRET = 4
FRAGMENT = 12
"""Characters of a key that are taken out of a text wherever they stand, should it hold a part."""

REPEATED = frozenset({408, 409, 425, 429})
"""Statuses that are asked again, as those from 500 on."""
HOPELESS = frozenset({401, 402, 404})
"""Statuses that every question would get: no key, no credit, no such model."""


class QuestionFailed(ValueError):
  """This question has no answer; others may."""


class EndpointRefused(ValueError):
  """No question would be answered."""


class _TryAgain(Exception):
  def __init__(self, reason: str, retry_after_s: float | None = None):
    super().__init__(reason)
    self.retry_after_s = retry_after_s


class ApiKey:
  """A key from the environment, which shows itself in the header alone."""

  __slots__ = ("_value", "name")

  def __init__(self, name: str):
    """`name`: the environment variable; without it no key is sent.

    Raises:
      ValueError: a character that no header can carry.
    """
    self.name = name
    self._value = os.environ.get(name, "").strip()
    if not (self._value.isascii() and all(map(str.isprintable, self._value))):
      raise ValueError(f"the key in {name} has characters that no header can carry")

  def __repr__(self) -> str:
    return f"ApiKey({self.name})"

  def __bool__(self) -> bool:
    return bool(self._value)

  def headers(self) -> dict[str, str]:
    """The header of a request."""
    return {"Authorization": f"Bearer {self._value}"} if self._value else {}

  def redact(self, text: str) -> str:
    """`text` without the key and without long parts of it.

    Keys under four characters are the placeholders of local servers, and stay.
    """
    if len(self._value) < SHORTEST_SECRET:
      return text
    text = text.replace(self._value, "[key]")
    for start in range(len(self._value) - FRAGMENT + 1):
      text = text.replace(self._value[start : start + FRAGMENT], "[key]")
    return text


@dataclass(frozen=True)
class Answer:
  """What a chat completion says."""

  text: str
  finish_reason: str
  model: str
  """The name that the server gives, which may be more exact than the one that was asked for."""
  input_tokens: int | None
  output_tokens: int | None
  """None where the server counts no tokens."""


def check_base_url(base_url: str) -> str:
  """The URL without its closing slash.

  Raises:
    ValueError: not http(s), or with a user, password or query, which would be written to files.
  """
  parts = urlsplit(base_url)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError("--base-url must be of the form https://host/v1")
  if parts.username or parts.password or parts.query or parts.fragment:
    raise ValueError("--base-url must hold no user, password or query: the key is in --key-env")
  return base_url.rstrip("/")


class ChatClient:
  """Asks one endpoint; `async with` closes its connections."""

  def __init__(
    self, base_url: str, key: ApiKey, *, timeout_s: float, retries: int, concurrency: int
  ):
    """`timeout_s` is for one attempt as a whole; `concurrency` bounds the connections."""
    logging.getLogger("httpcore2").setLevel(logging.INFO)  # its debug lines hold raw headers
    self._url = f"{check_base_url(base_url)}/chat/completions"
    self._key = key
    self._timeout_s = timeout_s
    self._retries = retries
    self._resume_at = 0.0  # when the server wants to hear from us again, by time.monotonic
    self._client = httpx2.AsyncClient(
      headers=key.headers(), timeout=None, limits=httpx2.Limits(max_connections=concurrency)
    )

  async def __aenter__(self) -> "ChatClient":
    await self._client.__aenter__()
    return self

  async def __aexit__(self, *exception: Any) -> None:
    await self._client.__aexit__(*exception)

  async def ask(self, body: Mapping[str, Any]) -> Answer:
    """The answer to one request.

    Asked again after what may pass: 429, 5xx, time-outs, lost connections, malformed answers. Waits
    grow exponentially, with jitter. Where the server says Retry-After, no question is asked before.

    Raises:
      QuestionFailed: no answer to this request, after all attempts or for good.
      EndpointRefused: the key, the model or the address is wrong.
    """
    for attempt in range(self._retries + 1):
      while (wait := self._resume_at - time.monotonic()) > 0:
        await asyncio.sleep(wait)
      try:
        return await self._try(body)
      except _TryAgain as error:
        problem = error
      if attempt < self._retries:
        await self._pause(attempt, problem)
    attempts = f"{self._retries + 1} attempts" if self._retries else "one attempt"
    raise QuestionFailed(f"{problem} (after {attempts})")

  async def _pause(self, attempt: int, problem: _TryAgain) -> None:
    wait = min(MAX_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
    asked = problem.retry_after_s
    if asked is not None and asked > MAX_RETRY_AFTER_S:
      raise QuestionFailed(f"{problem}; the server asks to wait {asked:.0f} s")
    if asked is not None:
      self._resume_at = max(self._resume_at, time.monotonic() + asked)
      wait = max(wait, asked + random.uniform(0.0, FIRST_WAIT_S))
    await asyncio.sleep(wait)

  async def _try(self, body: Mapping[str, Any]) -> Answer:
    try:
      async with asyncio.timeout(self._timeout_s):
        response = await self._client.post(self._url, json=body)
    except TimeoutError:
      raise _TryAgain(f"no answer within {self._timeout_s:g} s") from None
    except httpx2.RequestError as error:
      raise _TryAgain(self._shown(f"{type(error).__name__}: {error}")) from None
    status = response.status_code
    if response.is_success:
      return self._answer(response.text)
    if status == 401:  # the server may quote the key, so its words are not shown
      key = f"does not take the key in {self._key.name}" if self._key else "wants a key"
      raise EndpointRefused(f"{self._url} {key} (HTTP 401; set {self._key.name})")
    problem = f"HTTP {status}: {self._shown(_message(response.text))}"
    if status in HOPELESS:
      raise EndpointRefused(f"{self._url}: {problem}")
    if status in REPEATED or status >= 500:
      raise _TryAgain(problem, retry_after_s(response.headers.get("retry-after", "")))
    raise QuestionFailed(problem)

  def _answer(self, content: str) -> Answer:
    try:
      answer = parse_answer(json.loads(content))
    except (ValueError, RecursionError) as error:
      raise _TryAgain(self._shown(f"malformed answer ({error}): {_message(content)}")) from None
    return Answer(
      text=self._key.redact(answer.text),
      finish_reason=self._key.redact(answer.finish_reason),
      model=self._key.redact(answer.model),
      input_tokens=answer.input_tokens,
      output_tokens=answer.output_tokens,
    )

  def _shown(self, text: str) -> str:
    """One short line without the key, for error messages; it is cut after the key is gone."""
    return " ".join(self._key.redact(writable(text)).split())[:CHARACTERS_OF_AN_ERROR]


def parse_answer(completion: object) -> Answer:
  """The fields of a chat completion.

  >>> message = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
  >>> parse_answer(message | {"usage": {"prompt_tokens": 7, "completion_tokens": 1}})
  Answer(text='a', finish_reason='stop', model='', input_tokens=7, output_tokens=1)

  Raises:
    ValueError: it has no message.
  """
  completion = completion if isinstance(completion, dict) else {}
  choices = completion.get("choices")
  choice = choices[0] if isinstance(choices, list) and choices else None
  choice = choice if isinstance(choice, dict) else {}
  message = choice.get("message")
  if not isinstance(message, dict):
    raise ValueError("no message")
  usage = completion.get("usage")
  usage = usage if isinstance(usage, dict) else {}
  return Answer(
    text=writable(_content(message.get("content"))),
    finish_reason=_string(choice.get("finish_reason")),
    model=_string(completion.get("model")),
    input_tokens=_count(usage.get("prompt_tokens")),
    output_tokens=_count(usage.get("completion_tokens")),
  )


def retry_after_s(header: str, now: float | None = None) -> float | None:
  """Seconds of a Retry-After header, which is a number or a date; None for anything else.

  `now` is in seconds since the epoch, the current time where left out.

  >>> retry_after_s("2.5"), retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", now=50.0)
  (2.5, 10.0)
  """
  try:
    seconds = float(header)
  except ValueError:
    try:
      moment = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):
      return None
    seconds = moment - (time.time() if now is None else now)
  return max(0.0, seconds) if seconds == seconds else None


def _message(content: str) -> str:
  """The message of an error's body, else the body with JSON's escapes undone."""
  try:
    body = json.loads(content)
  except (ValueError, RecursionError):
    return content
  error = body.get("error") if isinstance(body, dict) else None
  message = error.get("message") if isinstance(error, dict) else error
  return message if isinstance(message, str) else json.dumps(body, ensure_ascii=False)


def _content(content: object) -> str:
  """The text of a message: a string, parts of which some are text, or nothing."""
  if isinstance(content, str):
    return content
  parts = content if isinstance(content, list) else []
  return "".join(_string(part.get("text")) for part in parts if isinstance(part, dict))


def _string(value: object) -> str:
  return writable(value) if isinstance(value, str) else ""


def _count(value: object) -> int | None:
  return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
