"""GRPO of R-Sa2VA 4B with masks in the loop, to the reference's numbers.

Source: arXiv 2512.05091 and its recipe vrt_qwen3_4b_grpo: from the SFT model, fresh LoRA of rank
128, SAM 2's decoder frozen; 4 samples for each of 32 prompts, format and answer reward, no KL, mask
losses on the best sample; one epoch of the 2 k prompts whose reward varies most.
Hardware: TPU pods (docs/pods.md); `mesh.fsdp` divides the parameters. With four chips or more
--grpo.rollout-tensor 4 (by estimate a step in half the time).
Expected: no figure of this recipe has been measured here.
Command: python -m scripts.select_rl_subset --checkpoint runs/vrt_4b_sft/model --data data/vrt80k
  --out keys.json --top 2000
  python -m vrt_jax.train --config configs/vrt_qwen3_4b_grpo.py --workdir runs/vrt_4b_grpo
  --base runs/vrt_4b_sft/model --data.keys keys.json --data.train data/vrt80k
  --data.eval data/vrt_eval
"""

import dataclasses

from configs import vrt_sa2va_4b_qwen3_sft as sft
from vrt_jax.config import GrpoConfig, LoraConfig, OptimConfig, TrainConfig

NUM_PROMPTS = 2_000
BATCH_SIZE = 32


def get_config() -> TrainConfig:
  """The recipe."""
  base = sft.get_config()
  return dataclasses.replace(
    base,
    algorithm="grpo",
    base="runs/vrt_4b_sft/model",
    model=dataclasses.replace(base.model, lora=LoraConfig(rank=128, alpha=256.0)),
    optim=OptimConfig(
      learning_rate=1e-5,
      betas=(0.9, 0.999),
      weight_decay=0.05,
      clip_norm=1.0,
      warmup_share=0.0,
      batch_size=BATCH_SIZE,
      steps=NUM_PROMPTS // BATCH_SIZE,
      trainable="language",
      remat="full",
    ),
    grpo=GrpoConfig(
      group_size=4,
      temperature=1.2,
      top_p=0.9,
      max_new_tokens=1024,
      max_masks=32,
      prompt_buckets=((sft.PATCHES // 4 + 256, sft.PATCHES),),
      format_weight=1.0,
      answer_weight=1.0,
      trace_weight=0.0,
      matching="reference",
      mask_loss="reference",
      html_every=10,
    ),
    log_every=1,
    checkpoint_every=10,
  )
