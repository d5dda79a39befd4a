"""Buckets: padding to a larger one equals collating into it."""

import jax
import numpy as np
import pytest

from tests import tiny
from vrt_jax.data.buckets import bucket_of, check_buckets, pad_to_bucket
from vrt_jax.data.transforms import collate, make_example
from vrt_jax.types import Batch

SMALL, LONG, LARGE = (288, 64), (384, 64), (384, 80)
BUCKETS = (SMALL, LONG, LARGE)


def batch(*buckets: tuple[int, int]) -> Batch:
  config = tiny.train_config()
  rng = np.random.default_rng(0)
  examples = [
    make_example(tiny.train_record(i), tiny.tokenizer(), config.data, config.image, rng)
    for i in range(3)
  ]
  return collate(examples, tiny.tokenizer(), config.model, config.image, buckets)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_padding_equals_collating_into_the_bucket(bucket: tuple[int, int]):
  small, expected = batch(*BUCKETS), batch(bucket)
  assert bucket_of(small, BUCKETS) == 0
  grown = pad_to_bucket(small, bucket)
  jax.tree.map(np.testing.assert_array_equal, grown, expected)
  assert jax.tree.map(lambda x: x.dtype, grown) == jax.tree.map(lambda x: x.dtype, expected)
  assert bucket_of(grown, BUCKETS) == BUCKETS.index(bucket)


def test_every_padded_field_matters():
  """Zeros alone are not the padding: labels and the visual index have values of their own."""
  grown = pad_to_bucket(batch(SMALL), LONG)
  assert (grown.targets.labels[:, SMALL[0] :] == -100).all()
  assert (grown.text.visual_index[:, SMALL[0] :] == -1).all()


def test_a_smaller_bucket_is_refused():
  with pytest.raises(ValueError, match=r"384 tokens and 64 patches does not fit .*\(288, 64\)"):
    pad_to_bucket(batch(LONG), SMALL)
  with pytest.raises(ValueError, match="none of the buckets"):
    bucket_of(batch(LONG), (SMALL, LARGE))


def test_buckets_hold_each_other():
  check_buckets(BUCKETS)
  for wrong in (((384, 64), (288, 80)), (SMALL, SMALL), (LARGE, SMALL), (), ((288, 0),)):
    with pytest.raises(ValueError, match=r"^data\.buckets must"):
      check_buckets(wrong)
