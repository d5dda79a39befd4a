"""A chat endpoint on this machine that answers as a test tells it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vrt_jax.data.records import EvalRecord, TFRecordWriter, serialize_eval

KEY = "sk-test/0123456789-abcdefghijklmnop"


@dataclass(frozen=True)
class Reply:
  """What the server sends back."""

  body: Any = None
  """JSON, or bytes that go as they are."""
  status: int = 200
  headers: dict[str, str] = field(default_factory=dict)
  delay_s: float = 0.0


def completion(
  text: Any, input_tokens: int = 100, output_tokens: int = 20, finish_reason: str = "stop"
) -> Reply:
  """A chat completion with a text."""
  choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
  usage = {"prompt_tokens": input_tokens, "completion_tokens": output_tokens}
  return Reply({"model": "fake-1", "choices": [choice], "usage": usage})


@dataclass
class Asked:
  """A request as it came."""

  path: str
  headers: dict[str, str]
  body: dict[str, Any]
  at: float

  @property
  def text(self) -> str:
    return self.body["messages"][0]["content"][1]["text"]

  @property
  def data_url(self) -> str:
    return self.body["messages"][0]["content"][0]["image_url"]["url"]


class FakeServer:
  """Requests in order of arrival, and the largest number of them at once."""

  def __init__(self, answer: Callable[[Asked], Reply]):
    self.answer = answer
    self.asked: list[Asked] = []
    self.most_at_once = 0
    self._now = 0
    self._lock = threading.Lock()
    self.url = ""

  def handle(self, asked: Asked) -> Reply:
    with self._lock:
      self.asked.append(asked)
      self._now += 1
      self.most_at_once = max(self.most_at_once, self._now)
      reply = self.answer(asked)
    time.sleep(reply.delay_s)
    with self._lock:
      self._now -= 1
    return reply


@contextlib.contextmanager
def serve(answer: Callable[[Asked], Reply]) -> Iterator[FakeServer]:
  """A server in a thread; `answer` is called for one request at a time."""
  fake = FakeServer(answer)

  class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      headers = {name.lower(): value for name, value in self.headers.items()}
      reply = fake.handle(Asked(self.path, headers, body, time.monotonic()))
      content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
      with contextlib.suppress(OSError):  # the client may have given up
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
      pass

  class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
      """A client that was killed or gave up."""

  server = Server(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  fake.url = f"http://127.0.0.1:{server.server_port}/v1"
  try:
    yield fake
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def write_records(path: Any, records: list[EvalRecord]) -> str:
  """A VRT-Eval file; gives its path."""
  with TFRecordWriter(path) as writer:
    for record in records:
      writer.write(serialize_eval(record))
  return str(path)
