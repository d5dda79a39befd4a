"""Prompt buckets for many questions."""

from vrt_jax.generate.batches import choose_buckets, coarse_patches


def test_few_buckets_with_little_padding():
  sizes = [(64, 256)] * 9 + [(64, 512), (128, 1024)]
  assert choose_buckets(sizes, 3) == ((64, 256), (64, 512), (128, 1024))
  assert choose_buckets(sizes, 2) == ((64, 256), (128, 1024))
  assert choose_buckets(sizes, 1) == ((128, 1024),)


def test_buckets_are_nested():
  sizes = [(192, 256), (64, 512), (128, 256), (128, 1024)]
  assert choose_buckets(sizes, 4) == ((192, 256), (192, 512), (192, 1024))


def test_patches_are_rounded_up():
  assert [coarse_patches(n) for n in (1, 256, 257)] == [256, 256, 512]
