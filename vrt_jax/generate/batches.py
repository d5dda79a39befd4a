"""Prompt buckets for many questions: few sizes, so that few programs are compiled.

sizes = [coarse_bucket(loaded, request, thinking) for request in requests]
choose_buckets(sizes)  -> EvalConfig.prompt_buckets
batch_order(sizes)     -> the order in which a batch holds prompts of like size
"""

import itertools
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from vrt_jax.data.buckets import Bucket
from vrt_jax.generate.predictor import Request, prompt_bucket
from vrt_jax.model_directory import Loaded
from vrt_jax.runtime import batch_parts

PATCH_STEP = 256
"""Patches of a bucket are a multiple of this."""
MAX_BUCKETS = 4
"""Programs that are compiled at most."""


def coarse_bucket(loaded: Loaded, request: Request, thinking: bool) -> Bucket:
  """(tokens, patches) that hold a request, patches in steps of `PATCH_STEP`.

  Raises:
    ValueError: the picture or the question cannot be used.
  """
  tokens, patches = prompt_bucket(loaded, request, thinking)
  return tokens, -(-patches // PATCH_STEP) * PATCH_STEP


def batch_size_of(asked: int, count: int, mesh: Mesh | AbstractMesh | None) -> int:
  """`asked`, but no more than `count` questions fill, and rounded up to what the mesh divides."""
  parts = 1 if mesh is None else batch_parts(mesh)
  return -(-min(asked, count) // parts) * parts


def batch_order(sizes: Sequence[Bucket]) -> list[int]:
  """Indices by patches, then tokens."""
  return sorted(range(len(sizes)), key=lambda i: (sizes[i][1], sizes[i][0], i))


def choose_buckets(sizes: Sequence[Bucket], max_buckets: int = MAX_BUCKETS) -> tuple[Bucket, ...]:
  """At most `max_buckets` nested (tokens, patches), ascending, that hold all `sizes`.

  Starts with one bucket a patch count and merges the neighbours whose merger pads the fewest
  patches. Example: (64, 256) nine times, (64, 512), (128, 1024) -> ((64, 256), (128, 1024)) for two
  buckets: one sample pads 512 patches, where nine would pad 256 each.
  """
  tokens: dict[int, int] = {}
  counts: dict[int, int] = {}
  for num_tokens, num_patches in sizes:
    tokens[num_patches] = max(num_tokens, tokens.get(num_patches, 0))
    counts[num_patches] = counts.get(num_patches, 0) + 1
  while len(counts) > max_buckets:
    patches = sorted(counts)
    padding = [counts[a] * (b - a) for a, b in itertools.pairwise(patches)]
    i = padding.index(min(padding))
    small, large = patches[i], patches[i + 1]
    counts[large] += counts.pop(small)
    tokens[large] = max(tokens[large], tokens.pop(small))
  buckets, largest = [], 0
  for num_patches in sorted(counts):
    largest = max(largest, tokens[num_patches])
    buckets.append((largest, num_patches))
  return tuple(buckets)
