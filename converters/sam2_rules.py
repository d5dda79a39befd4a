"""Names of SAM 2 in Meta's checkpoints (sam2 SAM2Base) and in transformers' (Sam2Model)."""

from converters.rules import Ignored, Rule, RuleTable, Tied

_CROSS = ("cross_attn_token_to_image", "cross_attn_image_to_token")
MEMORY = "memory of SAM 2 for video; single pictures have none"
VIDEO_MEMORY = (
  r"(memory_attention|memory_encoder|obj_ptr_proj|obj_ptr_tpos_proj|mask_downsample)\..+"
  r"|maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"
)
"""Meta's names of what only video takes."""
_HF_VIDEO_MEMORY = (
  r"(memory_attention|memory_encoder|object_pointer_proj|mask_downsample"
  r"|temporal_positional_encoding_projection_layer)\..+"
  r"|memory_temporal_positional_encoding|no_memory_positional_encoding|no_object_pointer"
  r"|occlusion_spatial_embedding_parameter"
)


def meta_rules(prefix: str = "", ours: str = "sam2.") -> tuple[Rule, ...]:
  """Meta's names behind `prefix`. Activations count in their nn.Sequential, not in our lists."""
  pairs = [
    ("image_encoder.trunk.patch_embed.proj.{rest}", "image_encoder.trunk.patch_embed.{rest}"),
    ("image_encoder.trunk.blocks.{i}.{rest}", "image_encoder.trunk.blocks.{i}.{rest}"),
    ("image_encoder.trunk.pos_embed", "image_encoder.trunk.pos_embed"),
    ("image_encoder.trunk.pos_embed_window", "image_encoder.trunk.pos_embed_window"),
    ("image_encoder.neck.convs.{i}.conv.bias", "image_encoder.neck.convs.{i}.bias"),
    ("sam_prompt_encoder.mask_downscaling.6.bias", "prompt_encoder.mask_downscaling.4.bias"),
    ("no_mem_embed", "no_mem_embed"),
  ]
  pairs += [
    (f"sam_prompt_encoder.mask_downscaling.{theirs}.{{rest}}", f"{name}.{i}.{{rest}}")
    for name in ("prompt_encoder.mask_downscaling",)
    for i, theirs in enumerate((0, 1, 3, 4))
  ]
  pairs += [
    (f"sam_prompt_encoder.{name}", f"prompt_encoder.{name}")
    for name in (
      "no_mask_embed.weight",
      "not_a_point_embed.weight",
      "pe_layer.positional_encoding_gaussian_matrix",
      "point_embeddings.{i}.weight",
    )
  ]
  pairs += [
    (f"sam_mask_decoder.{name}", f"mask_decoder.{name}")
    for name in (
      "conv_s0.bias",
      "conv_s1.bias",
      "iou_prediction_head.{rest}",
      "iou_token.weight",
      "mask_tokens.weight",
      "obj_score_token.weight",
      "output_hypernetworks_mlps.{rest}",
      "pred_obj_score_head.{rest}",
      "transformer.{rest}",
    )
  ]
  pairs += [
    (
      f"sam_mask_decoder.output_upscaling.{theirs}.{{rest}}",
      f"mask_decoder.output_upscaling.{i}.{{rest}}",
    )
    for i, theirs in enumerate((0, 1, 3))
  ]
  convolutions = [
    ("image_encoder.neck.convs.{i}.conv.weight", "image_encoder.neck.convs.{i}.weight"),
    ("sam_prompt_encoder.mask_downscaling.6.weight", "prompt_encoder.mask_downscaling.4.weight"),
    ("sam_mask_decoder.conv_s0.weight", "mask_decoder.conv_s0.weight"),
    ("sam_mask_decoder.conv_s1.weight", "mask_decoder.conv_s1.weight"),
  ]
  return (
    *(Rule(f"{prefix}{theirs}", f"{ours}{name}") for theirs, name in pairs),
    *(Rule(f"{prefix}{theirs}", f"{ours}{name}", "conv1x1") for theirs, name in convolutions),
  )


def _attention_pairs(theirs: str, ours: str) -> list[tuple[str, str]]:
  names = [("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj")]
  return [(f"{theirs}.{a}.{{rest}}", f"{ours}.{b}.{{rest}}") for a, b in names]


def _decoder_pairs() -> list[tuple[str, str]]:
  theirs = ours = "mask_decoder.transformer"
  pairs = _attention_pairs(
    f"{theirs}.final_attn_token_to_image", f"{ours}.final_attn_token_to_image"
  )
  for name in ("self_attn", *_CROSS):
    pairs += _attention_pairs(f"{theirs}.layers.{{i}}.{name}", f"{ours}.layers.{{i}}.{name}")
  pairs += [
    (f"{theirs}.layers.{{i}}.layer_norm{n}.{{rest}}", f"{ours}.layers.{{i}}.norm{n}.{{rest}}")
    for n in range(1, 5)
  ]
  pairs += [
    (f"{theirs}.layers.{{i}}.mlp.proj_in.{{rest}}", f"{ours}.layers.{{i}}.mlp.layers.0.{{rest}}"),
    (f"{theirs}.layers.{{i}}.mlp.proj_out.{{rest}}", f"{ours}.layers.{{i}}.mlp.layers.1.{{rest}}"),
    (f"{theirs}.layer_norm_final_attn.{{rest}}", f"{ours}.norm_final_attn.{{rest}}"),
  ]
  heads = ("output_hypernetworks_mlps.{i}", "iou_prediction_head", "pred_obj_score_head")
  layers = (("proj_in", 0), ("layers.0", 1), ("proj_out", 2))
  pairs += [
    (f"mask_decoder.{head}.{a}.{{rest}}", f"mask_decoder.{head}.layers.{b}.{{rest}}")
    for head in heads
    for a, b in layers
  ]
  upscaling = ("upscale_conv1", "upscale_layer_norm", "upscale_conv2")
  pairs += [
    (f"mask_decoder.{name}.{{rest}}", f"mask_decoder.output_upscaling.{i}.{{rest}}")
    for i, name in enumerate(upscaling)
  ]
  same = ("conv_s0.bias", "conv_s1.bias", "iou_token.weight", "mask_tokens.weight")
  return pairs + [
    (f"mask_decoder.{n}", f"mask_decoder.{n}") for n in (*same, "obj_score_token.weight")
  ]


def hf_rules(ours: str = "sam2.") -> tuple[Rule, ...]:
  """transformers' names."""
  trunk, block = "image_encoder.trunk", "vision_encoder.backbone.blocks.{i}"
  pairs = [
    ("vision_encoder.backbone.patch_embed.projection.{rest}", f"{trunk}.patch_embed.{{rest}}"),
    ("vision_encoder.backbone.pos_embed", f"{trunk}.pos_embed"),
    ("vision_encoder.backbone.pos_embed_window", f"{trunk}.pos_embed_window"),
    (f"{block}.layer_norm1.{{rest}}", f"{trunk}.blocks.{{i}}.norm1.{{rest}}"),
    (f"{block}.layer_norm2.{{rest}}", f"{trunk}.blocks.{{i}}.norm2.{{rest}}"),
    (f"{block}.attn.{{rest}}", f"{trunk}.blocks.{{i}}.attn.{{rest}}"),
    (f"{block}.proj.{{rest}}", f"{trunk}.blocks.{{i}}.proj.{{rest}}"),
    (f"{block}.mlp.proj_in.{{rest}}", f"{trunk}.blocks.{{i}}.mlp.layers.0.{{rest}}"),
    (f"{block}.mlp.proj_out.{{rest}}", f"{trunk}.blocks.{{i}}.mlp.layers.1.{{rest}}"),
    ("vision_encoder.neck.convs.{i}.bias", "image_encoder.neck.convs.{i}.bias"),
    (
      "prompt_encoder.shared_embedding.positional_embedding",
      "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    ("prompt_encoder.point_embed.weight", "prompt_encoder.point_embeddings.{row}.weight"),
    ("prompt_encoder.no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
    ("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.not_a_point_embed.weight"),
    ("prompt_encoder.mask_embed.conv3.bias", "prompt_encoder.mask_downscaling.4.bias"),
    ("no_memory_embedding", "no_mem_embed"),
    *_decoder_pairs(),
  ]
  pairs += [
    (f"prompt_encoder.mask_embed.{name}.{{rest}}", f"prompt_encoder.mask_downscaling.{i}.{{rest}}")
    for i, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))
  ]
  convolutions = [
    ("vision_encoder.neck.convs.{i}.weight", "image_encoder.neck.convs.{i}.weight"),
    ("prompt_encoder.mask_embed.conv3.weight", "prompt_encoder.mask_downscaling.4.weight"),
    ("mask_decoder.conv_s0.weight", "mask_decoder.conv_s0.weight"),
    ("mask_decoder.conv_s1.weight", "mask_decoder.conv_s1.weight"),
  ]
  return (
    *(Rule(theirs, f"{ours}{name}") for theirs, name in pairs),
    *(Rule(theirs, f"{ours}{name}", "conv1x1") for theirs, name in convolutions),
  )


META = RuleTable(meta_rules(), (Ignored(VIDEO_MEMORY, MEMORY),))
"""Meta's .pt files, SAM 2 and 2.1."""

HF = RuleTable(
  hf_rules(),
  (Ignored(_HF_VIDEO_MEMORY, MEMORY),),
  (
    Tied(
      "shared_image_embedding.positional_embedding",
      "prompt_encoder.shared_embedding.positional_embedding",
    ),
  ),
)
"""transformers' Sam2Model and Sam2VideoModel."""
