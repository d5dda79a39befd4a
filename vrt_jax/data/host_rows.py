"""A host's rows of every batch, as a part of one endless stream of samples."""

from dataclasses import dataclass
from typing import TypeVar

import grain

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
  """Which places of the stream a host reads, in the order in which its workers take turns.

  batch_size 4, host 1 of 2: rows 2 and 3 of every batch, places 2, 3, 6, 7, 10, 11, ..
  with 2 workers, which take every other element: 2, 6, 3, 7, 10, 14, 11, 15, ..
  """

  batch_size: int
  process_index: int
  process_count: int
  num_workers: int
  """At least 1: the process itself."""
  first: int
  """Number of the first batch."""

  @property
  def rows(self) -> int:
    """Of a batch that are this host's."""
    return self.batch_size // self.process_count

  def place(self, index: int) -> int:
    """Place of element `index`."""
    turn, worker = divmod(index, self.num_workers)
    group, row = divmod(turn, self.rows)
    batch = self.first + group * self.num_workers + worker
    return batch * self.batch_size + self.process_index * self.rows + row


class HostRows(grain.MapDataset[T]):
  """The elements of a host's share of an endless dataset."""

  def __init__(self, parent: grain.MapDataset[T], share: Share):
    super().__init__(parent)
    self._share = share

  def __len__(self) -> int:
    batches = len(self._parent) // self._share.batch_size - self._share.first
    return (batches - self._share.num_workers) * self._share.rows

  def __getitem__(self, index: int) -> T:
    return self._parent[self._share.place(index)]
