"""A web page on this machine that answers questions about uploaded pictures.

    GET /          the page
    POST /predict  {"image": base64, "question", "thinking"} -> {"text", "view", "picture"}

One model answers one question after the other; uploads and the number of waiting questions are
bounded. Only pages of this server may ask (Host and Origin are checked), and nothing is stored.
"""

import base64
import binascii
import io
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from PIL import Image

from vrt_jax.generate.predictor import Request
from vrt_jax.generate.reasoner import Reasoner, load
from vrt_jax.viewer.view import page, shown_size, trace_view

ASSETS = Path(__file__).parent / "viewer"
PICTURE_PX = 1000
"""Longer side of the picture that is shown."""
READ_TIMEOUT_S = 30


@dataclass(frozen=True)
class ServeSettings:
  """Where the page is, and its bounds."""

  host: str = "127.0.0.1"
  port: int = 8000
  max_new_tokens: int = 2048
  max_masks: int = 64
  max_upload_bytes: int = 24 * 2**20
  """Of a request; a picture is a third larger in it than its file."""
  max_pixels: int = 50_000_000
  max_question: int = 2000
  """Characters."""
  max_waiting: int = 8
  """Questions that are answered or wait; further ones are refused."""


class Refused(Exception):
  """A request that is not answered: HTTP status and the line for the user."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Answers:
  """One model, one question at a time."""

  def __init__(self, reasoner: Reasoner, settings: ServeSettings):
    self._reasoner, self._settings = reasoner, settings
    self._lock = threading.Lock()
    self._waiting = threading.BoundedSemaphore(settings.max_waiting)

  def answer(self, request: Request, thinking: bool) -> dict[str, Any]:
    """Text, view and picture; Refused where too many wait or the picture cannot be used."""
    with Image.open(io.BytesIO(request.image)) as header:
      if header.width * header.height > self._settings.max_pixels:
        raise Refused(413, f"the picture has more than {self._settings.max_pixels} pixels")
    if not self._waiting.acquire(blocking=False):
      raise Refused(503, "too many questions are waiting; try again in a moment")
    try:
      with self._lock:
        answer = self._reasoner.ask(request.image, request.question, thinking=thinking)
    finally:
      self._waiting.release()
    size = shown_size((answer.image.height, answer.image.width), PICTURE_PX)
    buffer = io.BytesIO()
    answer.image.resize(size[::-1], Image.Resampling.BOX).save(buffer, "JPEG", quality=85)
    return {
      "text": answer.text,
      "view": trace_view(answer.text, answer.objects(), size),
      "picture": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
    }


def parse_question(body: bytes, settings: ServeSettings) -> tuple[Request, bool]:
  """The request and whether it wants a trace; Refused with what is wrong."""
  try:
    entry = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Refused(400, "the request is not JSON") from error
  fields = entry if isinstance(entry, dict) else {}
  image, question = fields.get("image"), fields.get("question")
  if not isinstance(image, str) or not isinstance(question, str) or not question.strip():
    raise Refused(400, "the request needs a picture and a question")
  if len(question) > settings.max_question:
    raise Refused(400, f"the question is longer than {settings.max_question} characters")
  try:
    data = base64.b64decode(image, validate=True)
  except (binascii.Error, ValueError) as error:
    raise Refused(400, "the picture is not base64") from error
  question = question.encode("utf-8", "replace").decode()
  return Request(data, question), fields.get("thinking") is not False


def make_server(answers: Answers, settings: ServeSettings) -> ThreadingHTTPServer:
  """The server, listening; `serve_forever` starts it. OSError where the port is taken."""
  text = page_text().encode()

  class Handler(BaseHTTPRequestHandler):
    """One connection."""

    timeout = READ_TIMEOUT_S
    server_version, sys_version = "vrt-jax", ""

    def log_message(self, form: str, *values: object) -> None:
      """Says nothing: requests are private."""

    def do_GET(self) -> None:
      """The page."""
      try:
        self._check_origin()
        if self.path.partition("?")[0] != "/":
          raise Refused(404, "there is no such page")
      except Refused as refused:
        self._send_json(refused.status, {"error": str(refused)})
        return
      self._send(200, "text/html; charset=utf-8", text)

    def do_POST(self) -> None:
      """An answer, or one line that says why there is none."""
      try:
        self._check_origin()
        if self.path != "/predict":
          raise Refused(404, "there is no such page")
        request, thinking = parse_question(self._body(), settings)
        self._send_json(200, answers.answer(request, thinking))
      except Refused as refused:
        self._send_json(refused.status, {"error": str(refused)})
      except (ValueError, OSError, Image.DecompressionBombError) as error:
        line = " ".join(str(error).split())
        self._send_json(400, {"error": line or "the picture cannot be read"})

    def _check_origin(self) -> None:
      """Refused unless the page asked for is this server's, against pages that rebind its name."""
      host = self.headers.get("Host", "")
      if not is_own_host(host, settings.host):
        raise Refused(403, "this server does not answer to that name")
      origin = self.headers.get("Origin")
      if origin is not None and origin != f"http://{host}":
        raise Refused(403, "pages of other servers may not ask")

    def _body(self) -> bytes:
      length = self.headers.get("Content-Length", "")
      if not length.isascii() or not length.isdigit():
        raise Refused(411, "the request does not say how long it is")
      if len(length) > 12 or int(length) > settings.max_upload_bytes:
        self.close_connection = True
        raise Refused(413, f"a request may have {settings.max_upload_bytes // 2**20} MiB")
      return self.rfile.read(int(length))

    def _send_json(self, status: int, value: object) -> None:
      self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
      self.send_response(status)
      self.send_header("Content-Type", kind)
      self.send_header("Content-Length", str(len(content)))
      self.send_header("X-Content-Type-Options", "nosniff")
      self.send_header("Cache-Control", "no-store")
      self.end_headers()
      self.wfile.write(content)

  server = ThreadingHTTPServer((settings.host, settings.port), Handler)
  server.daemon_threads = True
  return server


def is_own_host(host: str, bound: str) -> bool:
  """Whether a Host header names the address that is served, or an address of loopback.

  A server on all addresses ("0.0.0.0", "::") answers to every numeric address, to no other name.
  """
  name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
  name = name.strip("[]").lower()
  if name in (bound.lower(), "localhost"):
    return True
  try:
    address = ip_address(name)
  except ValueError:
    return False
  return address.is_loopback or bound in ("0.0.0.0", "::")


def page_text() -> str:
  """The page with its form."""
  body = (ASSETS / "serve.html").read_text(encoding="utf-8")
  return page("vrt-jax", body, [ASSETS / "serve.css"], [ASSETS / "serve.js"])


def serve(checkpoint: str, settings: ServeSettings) -> None:
  """Loads the model and serves until interrupted.

  Raises:
    ValueError: the model directory cannot be loaded.
    OSError: the address cannot be bound.
  """
  reasoner = load(checkpoint, max_new_tokens=settings.max_new_tokens, max_masks=settings.max_masks)
  with make_server(Answers(reasoner, settings), settings) as server:
    host, port = server.socket.getsockname()[:2]
    print(f"http://{host}:{port}/  (Ctrl-C stops)", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()
