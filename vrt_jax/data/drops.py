"""Counts of unusable records, and the limit that stops a run."""

import collections
from collections.abc import Sequence
from typing import TypedDict


class DropState(TypedDict):
  """What a checkpoint keeps of a `DropCounter`."""

  read: int
  reasons: dict[str, int]


class DropCounter:
  """Counts records that were read and, by reason, those that were dropped."""

  MIN_READ = 20

  def __init__(self, max_bad_share: float):
    self.max_bad_share = max_bad_share
    self.read = 0
    self.reasons: collections.Counter[str] = collections.Counter()

  def count(self, usable: int, dropped: Sequence[str]) -> None:
    """Adds what a batch read.

    Raises:
      ValueError: more than `max_bad_share` of at least MIN_READ records were dropped.
    """
    self.read += usable + len(dropped)
    self.reasons.update(dropped)
    too_many = self.reasons.total() > self.max_bad_share * self.read
    if dropped and self.read >= self.MIN_READ and too_many:
      raise ValueError(too_many_unusable(self.reasons, self.read, self.max_bad_share))

  def state(self) -> DropState:
    """What a checkpoint keeps."""
    return {"read": self.read, "reasons": dict(self.reasons)}

  def restore(self, state: DropState) -> None:
    """Continues counting from a checkpoint."""
    self.read = state["read"]
    self.reasons = collections.Counter(state["reasons"])


def too_many_unusable(reasons: collections.Counter[str], read: int, limit: float) -> str:
  """The line that ends a run on bad data."""
  return (
    f"{reasons.total()} of {read} training records are unusable (limit {limit:.0%}, "
    f"data.max_bad_share): {dict(reasons)}"
  )
