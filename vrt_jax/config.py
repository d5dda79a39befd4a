"""Every setting of the system, as frozen dataclasses. The defaults are the embedded run.

A recipe in `configs/` returns a `TrainConfig`; the command line overrides single fields
(`--optim.learning-rate 1e-4`). Units are in the names; px are pixels.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class VisionConfig:
  """Qwen3-VL vision tower."""

  depth: int = 4
  hidden_size: int = 128
  num_heads: int = 4
  intermediate_size: int = 384
  patch_size: int = 12
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  num_position_embeddings: int = 100
  """A square number: learned positions of a side x side grid, interpolated to the image's."""
  out_hidden_size: int = 192
  deepstack_indexes: tuple[int, ...] = (1, 2)
  """After these blocks (0-based) a DeepStack merger taps the hidden states."""

  @property
  def patch_dim(self) -> int:
    """Values in a flattened patch: [3, temporal_patch_size, patch_size, patch_size]."""
    return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
  """Qwen3-VL text decoder."""

  vocab_size: int = 640
  hidden_size: int = 192
  num_layers: int = 4
  num_heads: int = 6
  num_kv_heads: int = 2
  head_dim: int = 32
  intermediate_size: int = 512
  rope_theta: float = 1e4
  mrope_section: tuple[int, int, int] = (6, 5, 5)
  """Rotary frequencies of time, row and column; they sum to head_dim / 2."""
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = True


@dataclass(frozen=True)
class Sam2Config:
  """SAM 2 for single images: Hiera trunk, FPN neck, prompt encoder and mask decoder."""

  image_size_px: int = 192
  embed_dim: int = 16
  num_heads: int = 1
  stages: tuple[int, ...] = (1, 2, 3, 1)
  """Blocks a stage; width and heads double from stage to stage."""
  global_attention_blocks: tuple[int, ...] = (4,)
  window_spec: tuple[int, ...] = (8, 4, 6, 6)
  window_pos_embed_background_size: tuple[int, int] = (7, 7)
  d_model: int = 64
  """Width of the neck, the prompts and the mask decoder."""
  decoder_depth: int = 2
  decoder_num_heads: int = 4
  decoder_mlp_dim: int = 128
  num_multimask_outputs: int = 3
  iou_head_hidden_dim: int = 64

  @property
  def feature_size(self) -> int:
    """Side of the stride-16 feature map the mask decoder attends to."""
    return self.image_size_px // 16

  @property
  def mask_size(self) -> int:
    """Side of the low-resolution mask logits (stride 4)."""
    return self.image_size_px // 4


@dataclass(frozen=True)
class LoraConfig:
  """LoRA on the seven linear layers of every text layer; rank 0 turns it off."""

  rank: int = 0
  alpha: float = 32.0
  dropout: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
  """Sa2VA: Qwen3-VL, SAM 2 and the two layers that join them. Stored in config.json."""

  vision: VisionConfig = field(default_factory=VisionConfig)
  text: TextConfig = field(default_factory=TextConfig)
  sam2: Sam2Config = field(default_factory=Sam2Config)
  lora: LoraConfig = field(default_factory=LoraConfig)
  seg_hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
  """Which hidden state prompts SAM 2: the last layer's output, or that after the final norm."""
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
