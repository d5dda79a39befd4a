"""Shares of hosts: contiguous rows, in the order of workers."""

import grain
import pytest

from vrt_jax.data.host_rows import HostRows, Share


def test_the_example_of_the_docstring():
  share = Share(batch_size=4, process_index=1, process_count=2, num_workers=1, first=0)
  assert [share.place(i) for i in range(6)] == [2, 3, 6, 7, 10, 11]
  share = Share(batch_size=4, process_index=1, process_count=2, num_workers=2, first=0)
  assert [share.place(i) for i in range(8)] == [2, 6, 3, 7, 10, 14, 11, 15]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_hosts_and_workers_cover_every_place_once(count: int, workers: int):
  """Batches of all workers in turn, of all hosts together, are the places in order."""
  batch_size, first, batches = 6, 2, 3 * workers
  dataset = grain.MapDataset.range(10_000)
  rows = {}
  for host in range(count):
    share = Share(batch_size, host, count, workers, first)
    places = HostRows(dataset, share)
    for worker in range(workers):
      own = places.slice(slice(worker, None, workers)).batch(share.rows, batch_fn=tuple)
      for turn in range(3):
        rows[turn * workers + worker, host] = own[turn]
  stream = [p for batch in range(batches) for host in range(count) for p in rows[batch, host]]
  assert stream == list(range(first * batch_size, (first + batches) * batch_size))
