"""Released sizes: Qwen3-VL, SAM 2, and the Sa2VA models made of both."""

from dataclasses import replace

from vrt_jax.config import LoraConfig, ModelConfig, Sam2Config, TextConfig, VisionConfig

VOCAB_SIZE = 151674
"""Qwen3's tokens and the five of Sa2VA: len(tokenizer)."""

_HIERA_L = Sam2Config(
  image_size_px=1024,
  embed_dim=144,
  num_heads=2,
  stages=(2, 6, 36, 4),
  global_attention_blocks=(23, 33, 43),
  window_spec=(8, 4, 16, 8),
  window_pos_embed_background_size=(7, 7),
  d_model=256,
  decoder_depth=2,
  decoder_num_heads=8,
  decoder_mlp_dim=2048,
  num_multimask_outputs=3,
  iou_head_hidden_dim=256,
)
_SMALL_WINDOWS = replace(_HIERA_L, embed_dim=96, num_heads=1, window_spec=(8, 4, 14, 7))
SAM2_SIZES: dict[str, Sam2Config] = {
  "tiny": replace(_SMALL_WINDOWS, stages=(1, 2, 7, 2), global_attention_blocks=(5, 7, 9)),
  "small": replace(_SMALL_WINDOWS, stages=(1, 2, 11, 2), global_attention_blocks=(7, 10, 13)),
  "base_plus": replace(
    _SMALL_WINDOWS,
    embed_dim=112,
    num_heads=2,
    stages=(2, 3, 16, 3),
    global_attention_blocks=(12, 16, 20),
    window_pos_embed_background_size=(14, 14),
  ),
  "large": _HIERA_L,
}
"""The four sizes of SAM 2, SAM 2 and 2.1 alike (sam2/configs/*.yaml)."""

_VISION = VisionConfig(
  depth=24,
  hidden_size=1024,
  num_heads=16,
  intermediate_size=4096,
  num_position_embeddings=48 * 48,
  out_hidden_size=2560,
  deepstack_indexes=(5, 11, 17),
)
_TEXT = TextConfig(
  vocab_size=VOCAB_SIZE,
  hidden_size=2560,
  num_layers=36,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  intermediate_size=9728,
  rope_theta=5e6,
  mrope_section=(24, 20, 20),
  tie_embeddings=True,
)
QWEN3_VL_SIZES: dict[str, tuple[VisionConfig, TextConfig]] = {
  "2B": (
    replace(_VISION, out_hidden_size=2048),
    replace(_TEXT, hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144),
  ),
  "4B": (_VISION, _TEXT),
  "8B": (
    replace(
      _VISION,
      depth=27,
      hidden_size=1152,
      intermediate_size=4304,
      out_hidden_size=4096,
      deepstack_indexes=(8, 16, 24),
    ),
    replace(_TEXT, hidden_size=4096, intermediate_size=12288, tie_embeddings=False),
  ),
}
"""Vision tower and text decoder of Qwen3-VL-*-Instruct (its config.json), with Sa2VA's tokens."""


def sa2va_sizes(qwen: str, sam2: str = "large", lora: LoraConfig | None = None) -> ModelConfig:
  """Sa2VA of a released Qwen3-VL and SAM 2, computing in bfloat16.

  Raises:
    ValueError: there is no such size.
  """
  if qwen not in QWEN3_VL_SIZES or sam2 not in SAM2_SIZES:
    raise ValueError(
      f"sizes {qwen!r} and {sam2!r}: Qwen3-VL has {', '.join(QWEN3_VL_SIZES)}, "
      f"SAM 2 {', '.join(SAM2_SIZES)}"
    )
  vision, text = QWEN3_VL_SIZES[qwen]
  return ModelConfig(
    vision=vision,
    text=text,
    sam2=SAM2_SIZES[sam2],
    lora=lora or LoraConfig(),
    compute_dtype="bfloat16",
  )
