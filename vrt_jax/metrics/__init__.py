"""The metrics of VRT-Bench in plain numpy: matching, LQ, SQ, mIoU, precision, intervals."""

from vrt_jax.metrics.matching import match_ious
from vrt_jax.metrics.results import PredictedMask, SampleResult, score_samples, write_results
from vrt_jax.metrics.summary import bootstrap_ci, summarize

__all__ = [
  "PredictedMask",
  "SampleResult",
  "bootstrap_ci",
  "match_ious",
  "score_samples",
  "summarize",
  "write_results",
]
