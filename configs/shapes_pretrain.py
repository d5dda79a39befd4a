"""The shipped base model: a small Sa2VA that segments what it is told to, without reasoning.

Source: ours; it stands where Sa2VA-Qwen3-VL-4B stands in the real recipe. Referring segmentation,
lists, descriptions and attribute questions on the shapes world, in the end under the prompt and
with the marks of a trace, so that its tokens and distances are known before there is reasoning.
The stages that lead to it (scripts/rebuild_base.sh) take its sizes and its data from here. Run by
itself this goes on from their last one and trains every parameter on text and masks together; the
shipped model stops before that (CONTRIBUTING.md, decisions).
Hardware: two CPU cores, about 6 minutes after the stages before it.
Command: python -m vrt_jax.train --config configs/shapes_pretrain.py
"""

from vrt_jax.config import DataConfig, ModelConfig, OptimConfig, SftLossConfig, TrainConfig


def get_config() -> TrainConfig:
  """The recipe."""
  return TrainConfig(
    model=ModelConfig(seg_hidden="post_norm"),
    base="runs/shapes_framed",
    data=DataConfig(
      shapes_task="framed",
      shapes_train_samples=2400,
      shapes_eval_samples=0,
      shapes_seed=4000,
      mask_resize="nearest-exact",
      buckets=((304, 144),),
    ),
    optim=OptimConfig(
      optimizer="muon",
      learning_rate=3e-4,
      batch_size=16,
      steps=150,
      trainable="all",
    ),
    sft=SftLossConfig(dice_weight=5.0, num_points=800, oversample_ratio=1.0, importance_share=0.0),
    evaluate_base=False,
  )
