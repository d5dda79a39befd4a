"""GRPO on the shapes world, from the model of configs/shapes_sft_long.py or another one (`--base`).

Source: ours; the road of configs/vrt_qwen3_4b_grpo.py at the embedded world's size. The reward is
the answer's and the form's; reasoning masks earn through `mention_weight`, credited to their own
words. Advantages are not divided by a group's deviation (Dr. GRPO): IoUs of equal answers differ a
little, and the division would turn that into full advantages.
Expected: from a model with R-LQ 80.0, R-SQ 87.3, A-mIoU 65.5 three seeds gave 83.6, 87.2, 68.5.
Hardware: two CPU cores, 5 to 6 seconds a step; an H200, 0.3 seconds.
Command: python -m vrt_jax.train --config configs/shapes_sft_long.py
  python -m vrt_jax.train --config configs/shapes_grpo.py
"""

from vrt_jax.config import (
  DataConfig,
  EvalConfig,
  GrpoConfig,
  LoraConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)


def get_config() -> TrainConfig:
  """The recipe."""
  return TrainConfig(
    algorithm="grpo",
    base="runs/shapes_sft_long/model",
    model=ModelConfig(lora=LoraConfig(rank=32)),
    data=DataConfig(
      shapes_train_samples=7200, shapes_eval_samples=500, mask_resize="nearest-exact"
    ),
    optim=OptimConfig(
      learning_rate=4e-4,
      weight_decay=0.0,
      warmup_share=0.0,
      batch_size=16,
      accumulation_steps=4,
      steps=270,
      trainable="language",
    ),
    grpo=GrpoConfig(
      group_size=8,
      temperature=1.0,
      top_p=1.0,
      max_new_tokens=144,
      max_masks=12,
      prompt_buckets=((160, 144),),
      format_weight=0.25,
      answer_weight=1.0,
      mention_weight=0.05,
      normalisation="dr_grpo",
      mask_loss="off",
      html_every=50,
    ),
    eval=EvalConfig(num_samples=500),
    log_every=1,
    checkpoint_every=45,
    eval_every=135,
  )
