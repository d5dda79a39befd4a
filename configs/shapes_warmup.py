"""Second stage of the shipped base model: one request, one object, one mask.

Source: ours. SAM 2 comes from scripts.pretrain_sam2, language from random weights; the two find
each other soonest where a text is about a single object. configs/shapes_pretrain.py goes on.
Hardware: two CPU cores, about six minutes.
Command: python -m vrt_jax.train --config configs/shapes_warmup.py
"""

from vrt_jax.config import DataConfig, ModelConfig, OptimConfig, SftLossConfig, TrainConfig


def get_config() -> TrainConfig:
  """The recipe."""
  return TrainConfig(
    model=ModelConfig(seg_hidden="post_norm"),
    base="runs/shapes_sam2",
    data=DataConfig(
      shapes_task="single",
      shapes_train_samples=6000,
      shapes_eval_samples=0,
      shapes_seed=2000,
      thinking=False,
      buckets=((88, 144),),
      num_objects=1,
    ),
    optim=OptimConfig(
      learning_rate=1e-3, betas=(0.9, 0.98), batch_size=24, steps=260, trainable="all"
    ),
    sft=SftLossConfig(dice_weight=5.0, num_points=800, oversample_ratio=1.0, importance_share=0.0),
    evaluate_base=False,
    checkpoint_every=200,
  )
