"""GRPO on the shapes world, from the model of configs/shapes_sft_long.py or another one (`--base`).

Source: ours; the road of configs/vrt_qwen3_4b_grpo.py at the embedded world's size, with the
trace's reward, true matching and refills.
Hardware: two CPU cores.
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
    data=DataConfig(shapes_eval_samples=500, mask_resize="nearest-exact"),
    optim=OptimConfig(
      learning_rate=2e-4,
      weight_decay=0.0,
      warmup_share=0.0,
      batch_size=16,
      steps=150,
      trainable="language",
    ),
    grpo=GrpoConfig(
      group_size=8,
      temperature=1.0,
      top_p=1.0,
      max_new_tokens=160,
      max_masks=12,
      prompt_buckets=((160, 144),),
      format_weight=0.5,
      answer_weight=1.0,
      trace_weight=0.5,
      drop_equal_groups=True,
      max_refills=1,
      html_every=25,
    ),
    eval=EvalConfig(num_samples=500),
    log_every=1,
    checkpoint_every=25,
    eval_every=50,
  )
