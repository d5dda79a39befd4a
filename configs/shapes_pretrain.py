"""The shipped base model: a small Sa2VA that segments what it is told to, without reasoning.

Source: ours, the last of four stages (CONTRIBUTING.md); it stands where Sa2VA-Qwen3-VL-4B stands
in the real recipe. Referring segmentation, lists, descriptions and attribute questions on the
shapes world; every parameter is trained.
Hardware: two CPU cores, about 20 minutes after the stages before it.
Command: python -m vrt_jax.train --config configs/shapes_pretrain.py
"""

from vrt_jax.config import DataConfig, ModelConfig, OptimConfig, SftLossConfig, TrainConfig


def get_config() -> TrainConfig:
  """The recipe."""
  return TrainConfig(
    model=ModelConfig(seg_hidden="post_norm"),
    base="runs/shapes_hints",
    data=DataConfig(
      train="runs/refer/shapes_train-*.tfrecord",
      thinking=False,
      buckets=((160, 144),),
      num_objects=5,
    ),
    optim=OptimConfig(
      learning_rate=7e-4,
      betas=(0.9, 0.98),
      batch_size=16,
      steps=800,
      trainable="all",
    ),
    sft=SftLossConfig(dice_weight=5.0, num_points=800, oversample_ratio=1.0, importance_share=0.0),
    evaluate_base=False,
    checkpoint_every=250,
  )
