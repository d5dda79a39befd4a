"""SFT of R-Sa2VA 4B on VRT-80k, to the reference's numbers.

Source: arXiv 2512.05091 and its recipe vrt_sa2va_4b_qwen3_sft: from Sa2VA-Qwen3-VL-4B, LoRA of rank
128 on every linear layer of the text decoder, text_hidden_fcs and the mask decoder trained, all
else frozen in bfloat16; 80 k samples, batch 64, one epoch.
Hardware: 16 TPU v5e chips or more (docs/pods.md); `mesh.fsdp` divides the parameters.
Expected (published): R-LQ 66.3, R-SQ 87.3, A-mIoU 59.5 on VRT-Bench.
Command: python -m converters.from_hf --src ByteDance/Sa2VA-Qwen3-VL-4B --dst models/sa2va_4b
  python -m vrt_jax.train --config configs/vrt_sa2va_4b_qwen3_sft.py --workdir runs/vrt_4b_sft
  --data.train 'data/vrt80k' --data.eval 'data/vrt_eval'
With 16 chips of 16 GiB: --optim.accumulation-steps 4 (one sample a chip at a time; long sequences
do not fit otherwise) --optim.remat linears --optim.full-remat-tokens 8192 (by estimate a fifth
faster).
"""

from vrt_jax.config import (
  DataConfig,
  EvalConfig,
  ImageConfig,
  LoraConfig,
  MeshConfig,
  OptimConfig,
  SftLossConfig,
  TrainConfig,
)
from vrt_jax.sizes import sa2va_sizes

NUM_SAMPLES = 80_000
BATCH_SIZE = 64
MAX_PIXELS = 2048 * 28 * 28
PATCHES = MAX_PIXELS // 16**2


def get_config(qwen: str = "4B") -> TrainConfig:
  """The recipe for a size of Qwen3-VL ("2B", "4B", "8B")."""
  return TrainConfig(
    base=f"models/sa2va_{qwen.lower()}",
    model=sa2va_sizes(qwen, lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05)),
    image=ImageConfig(
      min_pixels=512 * 28 * 28,
      max_pixels=MAX_PIXELS,
      inference_factor_px=28,
      grounding_size_px=1024,
    ),
    data=DataConfig(
      train="data/vrt80k",
      eval="data/vrt_eval",
      buckets=((2560, PATCHES), (4096, PATCHES), (8192, PATCHES)),
      num_objects=5,
      mask_resize="nearest",
      read_threads=16,
      num_workers=4,
    ),
    optim=OptimConfig(
      learning_rate=4e-5,
      betas=(0.9, 0.999),
      weight_decay=0.05,
      clip_norm=1.0,
      warmup_share=0.05,
      warmup_start_factor=1e-5,
      batch_size=BATCH_SIZE,
      steps=NUM_SAMPLES // BATCH_SIZE,
      trainable="adapters",
      remat="full",
    ),
    sft=SftLossConfig(),
    mesh=MeshConfig(data=1, fsdp=-1),
    eval=EvalConfig(
      batch_size=64,
      max_new_tokens=2048,
      max_masks=32,
      prompt_buckets=((PATCHES // 4 + 256, PATCHES),),
      num_samples=0,
      num_pictures=16,
    ),
    log_every=10,
    checkpoint_every=125,
    keep_checkpoints=2,
  )
