"""Asking many questions: bounded, resumed after a kill, failures recorded."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from eval.api import client as client_module
from eval.api import questions
from eval.api.client import ApiKey, ChatClient, EndpointRefused
from eval.api.questions import Prices, Totals, ask_all, progress, totals, unanswered
from eval.api.request import RequestSettings
from eval.api.responses import Response, ResponseLog
from tests.eval.api.fake_server import Asked, FakeServer, Reply, completion, serve, write_records
from vrt_jax.data.records import EvalRecord
from vrt_jax.data.sources import eval_source

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.005)


def records(count: int) -> list[EvalRecord]:
  buffer = io.BytesIO()
  Image.new("RGB", (60, 40), (90, 120, 150)).save(buffer, "PNG")
  image = buffer.getvalue()
  return [EvalRecord(f"k{i}", image, f"question {i}?", {}, [], [], [], 1) for i in range(count)]


def run(
  server: FakeServer,
  folder: Path,
  asked: Sequence[EvalRecord],
  concurrency: int = 4,
  retries: int = 0,
  prices: Prices | None = None,
) -> dict[str, Response]:
  """Asks, and gives what the log then holds."""
  settings = RequestSettings(server.url, "m", "yxyx_1000", 0, 50, 0.0, "{}")

  async def main(log: ResponseLog) -> None:
    async with ChatClient(
      server.url, ApiKey("NO_KEY"), timeout_s=5, retries=retries, concurrency=concurrency
    ) as client:
      await ask_all(client, settings, asked, log, concurrency=concurrency, prices=prices)

  with ResponseLog(folder, {"model": "m"}) as log:
    asyncio.run(main(log))
    return log.responses


def number(asked: Asked) -> int:
  return int(asked.text.split("?")[0].removeprefix("question "))


def test_questions_are_asked_at_once_up_to_a_bound(tmp_path):
  def answer(asked: Asked) -> Reply:
    return Reply(completion(f"answer {number(asked)}").body, delay_s=0.03)

  with serve(answer) as server:
    found = run(server, tmp_path, records(12), concurrency=3)
  assert server.most_at_once == 3 and len(server.asked) == 12
  assert {k: r.text for k, r in found.items()} == {f"k{i}": f"answer {i}" for i in range(12)}
  first = found["k0"]
  assert (first.sent_size, first.model, first.finish_reason) == ((40, 60), "fake-1", "stop")
  assert (first.input_tokens, first.output_tokens) == (100, 20) and first.seconds >= 0.03


def test_only_what_is_missing_is_asked(tmp_path):
  with serve(lambda asked: completion("a")) as server:
    run(server, tmp_path, records(3))
    run(server, tmp_path, records(5))
    run(server, tmp_path, records(5))
  assert sorted(map(number, server.asked)) == [0, 1, 2, 3, 4]


def test_errors_are_recorded_and_asked_again(tmp_path):
  broken = {1, 3}

  def answer(asked: Asked) -> Reply:
    bad = number(asked) in broken
    return Reply({"error": {"message": "no"}}, 500) if bad else completion("a")

  with serve(answer) as server:
    found = run(server, tmp_path, records(5), retries=1)
    assert [key for key in sorted(found) if found[key].error] == ["k1", "k3"]
    assert found["k1"].error == "HTTP 500: no (after 2 attempts)"
    assert len(server.asked) == 7 and totals(found.values()) == Totals(3, 2, 300, 60, 0)
    broken.clear()
    found = run(server, tmp_path, records(5))
  assert len(server.asked) == 9 and totals(found.values()).errors == 0


def test_an_endpoint_that_is_down_ends_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(questions, "MAX_FAILURES_IN_A_ROW", 4)
  with serve(lambda asked: Reply({}, 500)) as server:
    with pytest.raises(ValueError, match="4 questions in a row failed, the last: HTTP 500"):
      run(server, tmp_path, records(30), concurrency=2)
  assert 4 <= len(server.asked) <= 6


def test_a_refusing_endpoint_ends_the_run(tmp_path):
  with serve(lambda asked: Reply({}, 404)) as server:
    with pytest.raises(EndpointRefused, match="HTTP 404"):
      run(server, tmp_path, records(30), concurrency=2)
  assert len(server.asked) <= 4


def test_a_bad_picture_is_named(tmp_path):
  bad = [EvalRecord("k0", b"x", "question 0?", {}, [], [], [], 1)]
  with serve(lambda asked: completion("a")) as server:
    with pytest.raises(ValueError, match="sample k0: corrupt image"):
      run(server, tmp_path, bad)


def test_answers_to_other_data_are_refused(tmp_path):
  with serve(lambda asked: completion("a")) as server:
    run(server, tmp_path, records(2))
  others = [EvalRecord("k1", b"", "another?", {}, [], [], [], 1)]
  with ResponseLog(tmp_path, {"model": "m"}) as log:
    with pytest.raises(ValueError, match="answer to another question for 'k1'"):
      unanswered(log, others)


def test_costs(capsys, tmp_path):
  sums = Totals(answers=2, errors=2, input_tokens=2_000_000, output_tokens=1000, without_usage=0)
  assert sums.cost(Prices(1.5, 10.0)) == pytest.approx(3.01)
  assert progress(sums, Prices(1.5, 10.0)) == "2,000,000 + 1,000 tokens, cost 3.01, 2 errors"
  assert progress(Totals(1, 0, 5, 6, 0), None) == "5 + 6 tokens"
  uncounted = Response("a", "q", "t", output_tokens=3)
  assert totals([uncounted]) == Totals(1, 0, 0, 3, 1)
  with serve(lambda asked: completion("a", 3_000_000, 10)) as server:
    run(server, tmp_path, records(2), prices=Prices(1.0, 0.0))
  assert "6,000,000 + 20 tokens, cost 6.00" in capsys.readouterr().err


KILLED = """
import sys
from pathlib import Path
from tests.eval.api.test_questions import FakeServer, eval_source, run
server = FakeServer(None)
server.url = sys.argv[1]
source = eval_source(sys.argv[2])
run(server, Path(sys.argv[3]), [source[i] for i in range(len(source))], concurrency=1)
"""


def test_a_killed_run_goes_on(tmp_path):
  data = write_records(tmp_path / "eval.tfrecord", records(6))
  ready, killed = threading.Event(), threading.Event()

  def answer(asked: Asked) -> Reply:
    if number(asked) == 3 and not killed.is_set():
      ready.set()
      return Reply(completion("a").body, delay_s=0.5)
    return completion("a")

  with serve(answer) as server:
    command = [sys.executable, "-c", KILLED, server.url, data, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ready.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.set()
    assert (tmp_path / "out" / "responses.jsonl").read_bytes().count(b"\n") == 3
    with (tmp_path / "out" / "responses.jsonl").open("ab") as file:
      file.write(b'{"key": "k3", "quest')  # as if it had been in the middle of a line
    source = eval_source(data)
    found = run(server, tmp_path / "out", [source[i] for i in range(6)], concurrency=1)
  assert sorted(found) == [f"k{i}" for i in range(6)]
  assert [number(asked) for asked in server.asked] == [0, 1, 2, 3, 3, 4, 5]
