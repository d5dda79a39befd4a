"""Asking an endpoint all questions of a benchmark, some at once, and what that costs."""

import asyncio
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from eval.api.client import ChatClient, QuestionFailed
from eval.api.request import RequestSettings, sent_picture
from eval.api.responses import Response, ResponseLog
from vrt_jax.data.records import EvalRecord

MAX_FAILURES_IN_A_ROW = 20
"""So many failures without an answer in between end the run: the endpoint is down."""
PER_MILLION = 1e-6


@dataclass(frozen=True)
class Prices:
  """Prices of a million tokens, in any currency."""

  input: float
  output: float


@dataclass(frozen=True)
class Totals:
  """Sums over answers."""

  answers: int
  errors: int
  input_tokens: int
  output_tokens: int
  without_usage: int
  """Answers for which the server counted no tokens: the sums lack them."""

  def cost(self, prices: Prices) -> float:
    """In the prices' currency."""
    return PER_MILLION * (self.input_tokens * prices.input + self.output_tokens * prices.output)


def totals(responses: Collection[Response]) -> Totals:
  """The sums over the responses of a log."""
  answers = [r for r in responses if not r.error]
  return Totals(
    answers=len(answers),
    errors=len(responses) - len(answers),
    input_tokens=sum(r.input_tokens or 0 for r in answers),
    output_tokens=sum(r.output_tokens or 0 for r in answers),
    without_usage=sum(r.input_tokens is None or r.output_tokens is None for r in answers),
  )


def unanswered(log: ResponseLog, records: Sequence[EvalRecord]) -> list[EvalRecord]:
  """The records whose question has no answer yet, those that ended with an error among them.

  Raises:
    ValueError: a key of the log had another question, so its answers are to other data.
  """
  for record in records:
    response = log.responses.get(record.key)
    if response and response.question != record.question:
      raise ValueError(
        f"{log.path} has an answer to another question for {record.key!r}: the data are others"
      )
  return [record for record in records if not log.answered(record.key)]


async def ask_all(
  client: ChatClient,
  settings: RequestSettings,
  records: Sequence[EvalRecord],
  log: ResponseLog,
  *,
  concurrency: int,
  prices: Prices | None = None,
) -> None:
  """Asks what `log` has no answer to, `concurrency` questions at once, and appends each to it.

  A question that fails after all attempts is logged with its error.

  Raises:
    ValueError: no question can be answered, or a picture cannot be read.
  """
  missing = unanswered(log, records)
  failures = 0
  with tqdm(total=len(records), initial=len(records) - len(missing), unit="question") as bar:

    async def worker(queue: Iterator[EvalRecord]) -> None:
      nonlocal failures
      for record in queue:
        response = await ask(client, settings, record)
        log.append(response)
        bar.update()
        bar.set_postfix_str(progress(totals(log.responses.values()), prices))
        failures = failures + 1 if response.error else 0
        if failures >= MAX_FAILURES_IN_A_ROW:
          raise ValueError(f"{failures} questions in a row failed, the last: {response.error}")

    queue = iter(missing)
    workers = [asyncio.create_task(worker(queue)) for _ in range(concurrency)]
    try:
      await asyncio.gather(*workers)
    finally:
      for task in workers:
        task.cancel()
      await asyncio.gather(*workers, return_exceptions=True)


async def ask(client: ChatClient, settings: RequestSettings, record: EvalRecord) -> Response:
  """The response to one record's question, an error among them.

  Raises:
    ValueError: names the sample whose picture cannot be read.
    EndpointRefused: no question would be answered.
  """
  start = time.monotonic()
  try:
    picture = sent_picture(record.image, settings.box_format, settings.max_side)
  except ValueError as error:
    raise ValueError(f"sample {record.key}: {error}") from error
  try:
    answer = await client.ask(settings.body(record.question, picture))
  except QuestionFailed as error:
    return Response(record.key, record.question, sent_size=picture.size, error=str(error))
  return Response(
    key=record.key,
    question=record.question,
    text=answer.text,
    sent_size=picture.size,
    finish_reason=answer.finish_reason,
    model=answer.model,
    input_tokens=answer.input_tokens,
    output_tokens=answer.output_tokens,
    seconds=round(time.monotonic() - start, 3),
  )


def progress(sums: Totals, prices: Prices | None) -> str:
  """What stands behind the progress bar.

  >>> progress(Totals(3, 1, 4000, 500, 0), Prices(1.25, 10.0))
  '4,000 + 500 tokens, cost 0.01, 1 error'
  """
  parts = [f"{sums.input_tokens:,} + {sums.output_tokens:,} tokens"]
  if prices:
    parts.append(f"cost {sums.cost(prices):.2f}")
  if sums.errors:
    parts.append(f"{sums.errors} error{'s' if sums.errors > 1 else ''}")
  return ", ".join(parts)
