"""Prompt buckets for many questions."""

import jax

from tests import tiny
from tests.pictures import encoded, picture
from vrt_jax.generate.batches import batch_order, batch_size_of, choose_buckets, coarse_bucket
from vrt_jax.generate.predictor import Request, prompt_bucket


def test_few_buckets_with_little_padding():
  sizes = [(64, 256)] * 9 + [(64, 512), (128, 1024)]
  assert choose_buckets(sizes, 3) == ((64, 256), (64, 512), (128, 1024))
  assert choose_buckets(sizes, 2) == ((64, 256), (128, 1024))
  assert choose_buckets(sizes, 1) == ((128, 1024),)


def test_a_batch_fits_questions_and_devices():
  assert batch_size_of(8, 100, None) == 8 and batch_size_of(8, 3, None) == 3
  mesh = jax.sharding.AbstractMesh((2, 2, 3), ("data", "fsdp", "tensor"))
  assert [batch_size_of(n, 100, mesh) for n in (1, 4, 5)] == [4, 4, 8]
  assert batch_size_of(8, 3, mesh) == 4


def test_buckets_are_nested():
  sizes = [(192, 256), (64, 512), (128, 256), (128, 1024)]
  assert choose_buckets(sizes, 4) == ((192, 256), (192, 512), (192, 1024))


def test_a_bucket_has_few_sizes():
  request = Request(encoded(picture(300, 200)), "Where is it?")
  exact = prompt_bucket(tiny.loaded(), request, thinking=True)
  tokens, patches = coarse_bucket(tiny.loaded(), request, thinking=True)
  assert tokens == exact[0] and patches % 256 == 0 and 0 <= patches - exact[1] < 256


def test_like_prompts_come_together():
  assert batch_order([(9, 512), (8, 256), (7, 512), (8, 256)]) == [1, 3, 2, 0]
