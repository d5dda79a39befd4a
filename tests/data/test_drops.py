"""The count of unusable records."""

import json

import pytest

from vrt_jax.data.drops import DropCounter


def test_drop_counter_waits_for_enough_records():
  counter = DropCounter(0.05)
  counter.count(0, ["corrupt image"])
  counter.count(19, [])  # 1 of 20 is the limit, not above it
  with pytest.raises(ValueError, match="2 of 21"):
    counter.count(0, ["mask size"])
  copy = DropCounter(0.05)
  copy.restore(json.loads(json.dumps(counter.state())))
  assert copy.state() == counter.state()


def test_too_many_in_one_batch():
  counter = DropCounter(0.5)
  counter.count(15, ["a"] * 10 + ["b"] * 5)
  assert counter.state() == {"read": 30, "reasons": {"a": 10, "b": 5}}
  line = (
    r"^18 of 34 training records are unusable \(limit 50%, data.max_bad_share\): {'a': 10, 'b': 8}"
  )
  with pytest.raises(ValueError, match=line):
    counter.count(1, ["b"] * 3)
