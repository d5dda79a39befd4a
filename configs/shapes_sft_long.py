"""A longer SFT on the shapes world: more samples, each seen once or twice.

Source: ours; the main command with ten times the steps, a start for RL. It is meant to reach on 500
held-out samples what is published for SFT on VRT-Bench (R-LQ 66.3, R-SQ 87.3, A-mIoU 59.5).
Expected: R-LQ 80.0, R-SQ 87.3, A-mIoU 65.5 on an H200; 79.6, 87.4, 64.3 on CPUs.
Hardware: two CPU cores, 0.4 to 0.6 seconds a step; an H200, 0.02 seconds.
Command: python -m vrt_jax.train --config configs/shapes_sft_long.py
"""

import dataclasses

from vrt_jax.config import TrainConfig


def get_config() -> TrainConfig:
  """The recipe."""
  base = TrainConfig()
  return dataclasses.replace(
    base,
    data=dataclasses.replace(base.data, shapes_train_samples=30_000, shapes_eval_samples=500),
    optim=dataclasses.replace(base.optim, steps=5000),
    eval=dataclasses.replace(base.eval, num_samples=500),
    evaluate_base=False,
    checkpoint_every=250,
    eval_every=2500,
  )
