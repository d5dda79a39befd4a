"""The shipped base model: a small Sa2VA that segments what it is told to, without reasoning.

Source: ours, the last of four stages (CONTRIBUTING.md); it stands where Sa2VA-Qwen3-VL-4B stands
in the real recipe. Referring segmentation, lists, descriptions and attribute questions on the
shapes world, now under the prompt and with the marks of a trace, so that every token and distance
of a trace is known before there is reasoning, and with remarks on what is seen in words that traces
need; every parameter is trained.
Hardware: two CPU cores, about 31 minutes after the stages before it.
Command: python -m vrt_jax.train --config configs/shapes_pretrain.py
"""

from vrt_jax.config import DataConfig, ModelConfig, OptimConfig, SftLossConfig, TrainConfig


def get_config() -> TrainConfig:
  """The recipe."""
  return TrainConfig(
    model=ModelConfig(seg_hidden="post_norm"),
    base="runs/shapes_language",
    data=DataConfig(
      shapes_task="framed",
      shapes_train_samples=11200,
      shapes_eval_samples=0,
      shapes_seed=2000,
      buckets=((304, 144),),
    ),
    optim=OptimConfig(
      optimizer="muon",
      learning_rate=1e-3,
      betas=(0.9, 0.98),
      batch_size=16,
      steps=700,
      trainable="all",
    ),
    sft=SftLossConfig(dice_weight=5.0, num_points=800, oversample_ratio=1.0, importance_share=0.0),
    evaluate_base=False,
    checkpoint_every=250,
  )
