"""Sizes of the reference's 4B model: Qwen3-VL-4B-Instruct with SAM 2 Hiera-L (arXiv 2512.05091)."""

from converters.sam2_config import SAM2_SIZES
from vrt_jax.config import ModelConfig, TextConfig, VisionConfig

R_SA2VA_4B = ModelConfig(
  vision=VisionConfig(
    depth=24,
    hidden_size=1024,
    num_heads=16,
    intermediate_size=4096,
    num_position_embeddings=48 * 48,
    out_hidden_size=2560,
    deepstack_indexes=(5, 11, 17),
  ),
  text=TextConfig(
    vocab_size=151674,
    hidden_size=2560,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=9728,
    rope_theta=5e6,
    mrope_section=(24, 20, 20),
    tie_embeddings=False,
  ),
  sam2=SAM2_SIZES["large"],
)
"""5,049,567,425 parameters, those of video memory aside, with an output embedding of its own."""
