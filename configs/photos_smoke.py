"""Three SFT steps on real photographs at the reference's full preprocessing, with a small model.

Source: the SFT recipe of R-Sa2VA (arXiv 2512.05091, vrt_sa2va_4b_qwen3_sft): its picture sizes,
five objects a sample and 12544 points a mask, and the structure of its model at small widths, from
random weights. It shows that real inputs go through the whole road; the scores mean nothing.
Hardware: two CPU cores, 2.1 GB of memory, two to three minutes.
Command: python -m vrt_jax.train --config configs/photos_smoke.py --workdir runs/photos_smoke
  --data.train photos_train.tfrecord --data.eval photos_eval.tfrecord
  (without --data.eval there is no evaluation; --tokenizer DIR takes another tokenizer)
"""

from vrt_jax.config import (
  DataConfig,
  EvalConfig,
  ImageConfig,
  LoraConfig,
  ModelConfig,
  OptimConfig,
  Sam2Config,
  SftLossConfig,
  TextConfig,
  TrainConfig,
  VisionConfig,
)

MAX_PIXELS = 2048 * 28 * 28
PATCHES = MAX_PIXELS // 16**2
VISUAL_TOKENS = PATCHES // 4


def get_config() -> TrainConfig:
  """The recipe."""
  return TrainConfig(
    base="",
    model=ModelConfig(
      vision=VisionConfig(
        depth=4,
        hidden_size=64,
        num_heads=2,
        intermediate_size=128,
        num_position_embeddings=48 * 48,
        out_hidden_size=64,
        deepstack_indexes=(0, 1, 2),
      ),
      text=TextConfig(
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
        rope_theta=5e6,
      ),
      sam2=Sam2Config(image_size_px=1024, window_spec=(8, 4, 16, 8)),
      lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05),
    ),
    image=ImageConfig(
      min_pixels=512 * 28 * 28,
      max_pixels=MAX_PIXELS,
      inference_factor_px=28,
      grounding_size_px=1024,
    ),
    data=DataConfig(buckets=((VISUAL_TOKENS + 352, PATCHES),)),
    optim=OptimConfig(learning_rate=4e-5, batch_size=1, steps=3, trainable="adapters"),
    sft=SftLossConfig(num_points=12544),
    eval=EvalConfig(
      batch_size=1,
      max_new_tokens=24,
      max_masks=4,
      prompt_buckets=((VISUAL_TOKENS + 160, PATCHES),),
      num_samples=2,
      num_pictures=2,
    ),
    evaluate_base=False,
    log_every=1,
    checkpoint_every=3,
  )
