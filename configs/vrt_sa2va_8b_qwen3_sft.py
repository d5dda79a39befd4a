"""SFT of R-Sa2VA on Qwen3-VL 8B: the recipe of vrt_sa2va_4b_qwen3_sft with another base model.

Source: arXiv 2512.05091 trains the 4B model; sizes are those of Qwen3-VL-8B-Instruct. No figures
are published for it.
Hardware: as for 4B (docs/pods.md).
Command: python -m converters.from_hf --src ByteDance/Sa2VA-Qwen3-VL-8B --dst models/sa2va_8b
  python -m vrt_jax.train --config configs/vrt_sa2va_8b_qwen3_sft.py --workdir runs/vrt_8b_sft
  --data.train 'data/vrt80k' --data.eval 'data/vrt_eval'
"""

from configs import vrt_sa2va_4b_qwen3_sft
from vrt_jax.config import TrainConfig


def get_config() -> TrainConfig:
  """The recipe."""
  return vrt_sa2va_4b_qwen3_sft.get_config("8B")
