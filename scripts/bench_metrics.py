"""IoUs of run-length encoded masks beside dense ones in numpy, at the size of a photograph."""

from dataclasses import dataclass

import numpy as np

from scripts.bench_runs import medians
from vrt_jax.ops.masks import encode_rle, iou_matrix


@dataclass(frozen=True)
class MetricsArgs:
  """Measures the IoU matrix of predicted and true masks that come as RLEs."""

  height: int = 1500
  width: int = 2250
  predicted: int = 10
  true: int = 5
  repeats: int = 5


def ellipses(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
  """[count, height, width] ellipses with ragged edges."""
  y, x = np.mgrid[:height, :width]
  masks = np.zeros((count, height, width), bool)
  for mask in masks:
    cy, cx = rng.uniform(0.2, 0.8, 2) * (height, width)
    ry, rx = rng.uniform(0.05, 0.25, 2) * (height, width)
    edge = 1 + 0.1 * np.sin(x / 7) * np.cos(y / 11)
    mask[:] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < edge
  return masks


def dense_ious(pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
  """The IoU matrix pixel by pixel, one pair at a time, float32."""
  table = np.zeros((len(pred), len(gt)), np.float32)
  for i, one in enumerate(pred):
    for j, other in enumerate(gt):
      either = np.count_nonzero(one | other)
      table[i, j] = np.count_nonzero(one & other) / either if either else 0.0
  return table


def measure_metrics(args: MetricsArgs) -> dict:
  """The line of results; `ratio` is dense numpy's time by that of the RLEs.

  Raises:
    AssertionError: the IoUs differ in any bit.
  """
  rng = np.random.default_rng(0)
  pred = ellipses(rng, args.predicted, args.height, args.width)
  gt = ellipses(rng, args.true, args.height, args.width)
  encoded = [[encode_rle(mask) for mask in masks] for masks in (pred, gt)]
  runs = {"rle": lambda: iou_matrix(*encoded), "dense": lambda: dense_ious(pred, gt)}
  np.testing.assert_array_equal(runs["rle"](), runs["dense"]())
  median = medians(runs, args.repeats)
  return {
    "name": "metrics_rle",
    "unit": "seconds",
    "rle": round(median["rle"], 5),
    "dense": round(median["dense"], 5),
    "ratio": round(median["dense"] / median["rle"], 1),
    "size": [args.height, args.width],
    "masks": [args.predicted, args.true],
    "repeats": args.repeats,
  }
