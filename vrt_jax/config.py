"""Every setting of the system, as frozen dataclasses. The defaults are the embedded run.

A recipe in `configs/` returns a `TrainConfig`; the command line overrides single fields
(`--optim.learning-rate 1e-4`). Units are in the names; px are pixels.
"""

from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, TypeVar, get_type_hints

T = TypeVar("T")
NearestMode = Literal["nearest", "nearest-exact"]
"""Of resizing without interpolation, in torch's words."""
Remat = Literal["none", "linears", "full"]
ComputeDtype = Literal["float32", "bfloat16"]
SegHidden = Literal["pre_norm", "post_norm"]


@dataclass(frozen=True)
class VisionConfig:
  """Qwen3-VL vision tower."""

  depth: int = 4
  hidden_size: int = 128
  num_heads: int = 4
  intermediate_size: int = 384
  patch_size: int = 16
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  num_position_embeddings: int = 144
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
  num_kv_heads: int = 3
  head_dim: int = 32
  intermediate_size: int = 512
  rope_theta: float = 5e6
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
  alpha: float = 64.0
  dropout: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
  """Sa2VA: Qwen3-VL, SAM 2 and the two layers that join them. Stored in config.json."""

  vision: VisionConfig = field(default_factory=VisionConfig)
  text: TextConfig = field(default_factory=TextConfig)
  sam2: Sam2Config = field(default_factory=Sam2Config)
  lora: LoraConfig = field(default_factory=LoraConfig)
  seg_hidden: SegHidden = "pre_norm"
  """Which hidden state prompts SAM 2: the last layer's output, or that after the final norm."""
  compute_dtype: ComputeDtype = "float32"


@dataclass(frozen=True)
class ImageConfig:
  """How pictures become model inputs. Stored in processor.json."""

  patch_size: int = 16
  temporal_patch_size: int = 2
  merge_size: int = 2
  min_pixels: int = 96 * 96
  max_pixels: int = 192 * 192
  """The picture is resized to multiples of patch_size * merge_size within these bounds."""
  inference_factor_px: int = 0
  """At inference a first resize to multiples of this (28 in the reference); 0 for none."""
  inference_min_pixels: int = 4 * 784
  inference_max_pixels: int = 16384 * 784
  grounding_size_px: int = 192
  """SAM 2's square input; the same as Sam2Config.image_size_px."""


@dataclass(frozen=True)
class DataConfig:
  """Training and held-out records, and the shapes they are padded to."""

  train: str = ""
  """Glob of VRT-80k TFRecord files; empty for the shapes world, written into the workdir."""
  eval: str = ""
  """Glob of VRT-Eval TFRecord files; empty as above."""
  shapes_task: Literal["trace", "refer", "framed"] = "trace"
  shapes_train_samples: int = 3600
  shapes_eval_samples: int = 200
  shapes_seed: int = 0
  thinking: bool = True
  """Train on reasoning and answer; False: the bare question and the answer."""
  keys: str = ""
  """JSON {"samples": [..]} with the keys of a subset; empty for all records."""
  buckets: tuple[tuple[int, int], ...] = ((288, 144),)
  """(tokens, patches) sizes, ascending; a batch takes the first that holds all its samples."""
  num_objects: int = 5
  """Masks a sample: repeated cyclically when it has fewer, a random choice when more."""
  mask_resize: NearestMode = "nearest"
  """Which pixel of a cell its mask is read from: the first one as in the reference, so that learned
  masks lie about half a cell too far right and down, or the middle one ("nearest-exact")."""
  max_bad_share: float = 0.05
  """The run stops when more than this share of the records read so far was unusable."""
  read_threads: int = 2
  """Threads of each reading process."""
  num_workers: int = 0
  """Processes of a host that read, decode and pad beside the training process; 0 for none."""
  blind: bool = False
  """Replace every picture by noise: how much is won without looking."""


@dataclass(frozen=True)
class OptimConfig:
  """AdamW or Muon with linear warm-up and cosine decay to 0."""

  optimizer: Literal["adamw", "muon"] = "adamw"
  """muon: Muon for matrices of linear layers, at twice the learning rate, AdamW for the rest."""
  learning_rate: float = 3e-3
  betas: tuple[float, float] = (0.9, 0.98)
  weight_decay: float = 0.05
  clip_norm: float = 1.0
  warmup_share: float = 0.05
  """Part of the steps that warm up."""
  warmup_start_factor: float = 1e-5
  """Learning rate of the first step, relative to the full one."""
  batch_size: int = 8
  accumulation_steps: int = 1
  """The batch is computed in this many equal parts."""
  steps: int = 440
  max_skipped_steps: int = 20
  """Steps with a non-finite loss or gradient change nothing; the run stops after so many."""
  trainable: Literal["language", "adapters", "all"] = "adapters"
  """language: LoRA and text_hidden_fcs; adapters: the mask decoder too; all: every parameter."""
  remat: Remat = "none"
  """What a text layer computes again in the backward pass: nothing ("none"), all but the results of
  its linear layers and attention ("linears"), all but attention ("full")."""
  full_remat_tokens: int = 0
  """Sequences of so many tokens and longer ones are computed again as with "full"; 0: no others."""


@dataclass(frozen=True)
class SftLossConfig:
  """Weights and point sampling of the SFT losses (reference: loss_mask 2.0, loss_dice 0.5)."""

  text_weight: float = 1.0
  bce_weight: float = 2.0
  dice_weight: float = 0.5
  num_points: int = 12544
  oversample_ratio: float = 3.0
  importance_share: float = 0.75


@dataclass(frozen=True)
class GrpoConfig:
  """Group relative policy optimisation with masks in the loop; the defaults are the reference's."""

  group_size: int = 4
  """Samples a prompt."""
  temperature: float = 1.2
  top_p: float = 0.9
  tempered: bool = False
  """The policy is the model at `temperature`, as it is sampled, and not at temperature 1, as in the
  reference."""
  max_new_tokens: int = 1024
  max_masks: int = 32
  """[SEG] a sample that get a mask; later ones have none."""
  prompt_buckets: tuple[tuple[int, int], ...] = ((160, 144),)
  """(tokens, patches) sizes of a prompt, ascending; drop_equal_groups takes a single one."""
  format_weight: float = 1.0
  answer_weight: float = 1.0
  trace_weight: float = 0.0
  """Of the reasoning masks against the trace's evidence objects; the reference has no such term."""
  mention_weight: float = 0.0
  """Of what each reasoning mask earns by itself, credited to its mention and those before it."""
  extra_rewards: tuple[tuple[str, float], ...] = ()
  """("package.module:function", weight): functions of a Sample, see `vrt_jax.rl.rewards`."""
  reward_clip: tuple[float, float] | None = None
  """Bounds of the weighted sum of all rewards; None for no bounds."""
  matching: Literal["hungarian", "reference"] = "hungarian"
  """reference: the reference's rewards to the letter, which look at the first pair alone where a
  side has one mask; hungarian: true matching, and no format reward for texts that do not end."""
  normalisation: Literal["grpo", "dr_grpo"] = "grpo"
  """grpo: advantages over the group's deviation, token means; dr_grpo: neither, sums over
  max_new_tokens (arXiv 2503.20783)."""
  epsilon: float = 0.2
  """The ratio is clipped to 1 -+ epsilon; without effect on the first update of a rollout."""
  updates_per_rollout: int = 1
  kl_weight: float = 0.0
  """Of the KL divergence to the start model, which is the policy with its adapters turned off."""
  drop_equal_groups: bool = False
  """Groups whose rewards are all equal are replaced by those of other prompts (DAPO)."""
  max_refills: int = 3
  """Further rollouts of a step that may replace them; what is still missing then stays."""
  mask_loss: Literal["off", "reference", "answers"] = "answers"
  """Of a group's best sample: none; its masks merged as in the reference, where reasoning masks
  count as logit 0; or merged over the answer's masks alone."""
  html_every: int = 20
  """Steps between pages that show rollouts; 0 for none."""
  rollout_tensor: int = 1
  """So many devices of the fsdp axis divide the weights of a rollout by heads, MLPs and vocabulary
  instead of having them whole: each reads a part of them a token, for the samples of all."""


@dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what is left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  slices: int = 1
  """TPU slices that are joined by the data centre's network; the data axis spans them."""


@dataclass(frozen=True)
class EvalConfig:
  """Held-out generation and scoring."""

  batch_size: int = 50
  max_new_tokens: int = 160
  max_masks: int = 12
  """[SEG] a text whose masks are kept; later ones have no mask."""
  prompt_buckets: tuple[tuple[int, int], ...] = ((160, 144),)
  """(tokens, patches) sizes of a prompt."""
  num_samples: int = 200
  """Records that are scored; 0 for all."""
  num_pictures: int = 8
  """Overlay pictures that are drawn."""
  tensor: int = 1
  """Devices of training's fsdp axis that divide the weights of a held-out prediction."""


@dataclass(frozen=True)
class TrainConfig:
  """A recipe: `python -m vrt_jax.train --config configs/NAME.py`. The defaults are the main job."""

  algorithm: Literal["sft", "grpo"] = "sft"
  model: ModelConfig = field(default_factory=lambda: ModelConfig(lora=LoraConfig(rank=32)))
  """With a base model, only `model.lora` counts; the rest comes from the model directory."""
  image: ImageConfig = field(default_factory=ImageConfig)
  """For random weights; otherwise the base model's processor.json counts."""
  data: DataConfig = field(default_factory=lambda: DataConfig(mask_resize="nearest-exact"))
  optim: OptimConfig = field(default_factory=OptimConfig)
  sft: SftLossConfig = field(
    default_factory=lambda: SftLossConfig(
      dice_weight=5.0, num_points=800, oversample_ratio=1.0, importance_share=0.0
    )
  )
  """The embedded run weighs dice up, since its objects are small; the reference's are the defaults
  of `SftLossConfig`."""
  grpo: GrpoConfig = field(default_factory=GrpoConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  base: str = "shapes_base"
  """Model directory to start from; "shapes_base" is the shipped base model, "" random weights."""
  tokenizer: str = ""
  """Folder with tokenizer.json, for random weights; empty to train one on the shapes texts."""
  evaluate_base: bool = True
  """Score the base model before training, for comparison."""
  seed: int = 0
  log_every: int = 10
  checkpoint_every: int = 50
  keep_checkpoints: int = 2
  """The last so many; the best one is kept beside them."""
  eval_every: int = 0
  """Steps between evaluations on the held-out records, a multiple of checkpoint_every; 0: only at
  the end."""
  best_metric: str = "answer_miou"
  """Name in `metrics` of the results file by which the best checkpoint is chosen."""
  early_stop: int = 0
  """Evaluations without a better best_metric after which the run stops; 0: it goes to its end."""
  profile_step: int = 0
  """Three steps from this one on are traced into WORKDIR/profile (xprof); 0: none."""


def from_dict(cls: type[T], values: dict, name: str) -> T:
  """A configuration dataclass from its JSON form (lists become tuples).

  Raises:
    ValueError: `values` has an unknown field; `name` says where it came from.
  """
  hints = get_type_hints(cls)
  if unknown := sorted(set(values) - set(hints)):
    raise ValueError(f"{name}: unknown field {unknown[0]}; {cls.__name__} has {sorted(hints)}")

  def convert(value: Any, hint: type, key: str) -> object:
    if is_dataclass(hint):
      return from_dict(hint, value, f"{name}: {key}")
    if isinstance(value, list):
      return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return value

  return cls(**{key: convert(value, hints[key], key) for key, value in values.items()})
