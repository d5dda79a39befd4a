"""Model FLOPs of a sample, exactly: matrix products and attention, nothing that is computed twice.

Attention of text counts the half that is not masked. Norms, activations and the like do not count.
Source: the shapes of Qwen3-VL and SAM 2; SAM 2 is counted from its traced program.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from vrt_jax.config import GrpoConfig, ModelConfig, TextConfig, VisionConfig
from vrt_jax.models.layers import ShapeRngs
from vrt_jax.models.sam2.hiera import run_blocks
from vrt_jax.models.sam2.model import ImageFeatures, MaskOutput, Sam2


@dataclass(frozen=True)
class TextFlops:
  """Forward FLOPs of the text decoder for one sequence."""

  linears: float
  lora: float
  attention: float
  head: float


def text_flops(text: TextConfig, lora_rank: int, tokens: int, head_tokens: int) -> TextFlops:
  """Of `tokens` tokens, the output embedding on `head_tokens` of them."""
  d, f = text.hidden_size, text.intermediate_size
  q, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
  pairs = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
  layers = text.num_layers
  return TextFlops(
    linears=2.0 * tokens * layers * sum(a * b for a, b in pairs),
    lora=2.0 * tokens * layers * lora_rank * sum(a + b for a, b in pairs),
    attention=attention_flops(text, tokens * (tokens + 1) / 2),
    head=2.0 * head_tokens * d * text.vocab_size,
  )


def attention_flops(text: TextConfig, pairs: float) -> float:
  """Forward FLOPs of all layers for so many pairs of a query and a key that it may look at."""
  return 4.0 * text.num_layers * text.num_heads * text.head_dim * pairs


def group_pairs(prompt: int, group_size: int, new_tokens: int) -> float:
  """Pairs of a prompt and its completions, each of which sees the prompt and itself."""
  own = new_tokens * (new_tokens + 1) / 2
  return prompt * (prompt + 1) / 2 + group_size * (new_tokens * prompt + own)


def vision_flops(vision: VisionConfig, patches: int) -> float:
  """Forward FLOPs of the vision tower for one picture."""
  d, f = vision.hidden_size, vision.intermediate_size
  folded = d * vision.spatial_merge_size**2
  tokens = patches // vision.spatial_merge_size**2
  block = 2.0 * patches * (4 * d * d + 2 * d * f) + 4.0 * patches**2 * d
  merger = 2.0 * tokens * (folded * folded + folded * vision.out_hidden_size)
  embed = 2.0 * patches * (vision.patch_dim * d + 4 * d)  # the four learned positions of a patch
  return embed + vision.depth * block + (1 + len(vision.deepstack_indexes)) * merger


def sam2_flops(config: ModelConfig, num_masks: int) -> tuple[float, float]:
  """Forward FLOPs (image encoder, mask decoder with its prompts) for one picture."""
  size = config.sam2.image_size_px
  model = nnx.eval_shape(lambda: Sam2(config.sam2, ShapeRngs()))
  graphdef, state = nnx.split(model)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  prompts = jax.ShapeDtypeStruct((1, num_masks, config.sam2.d_model), jnp.float32)

  def encode(state: nnx.State, image: jax.Array) -> ImageFeatures:
    return nnx.merge(graphdef, state).encode_image(image)

  def decode(state: nnx.State, features: ImageFeatures, prompts: jax.Array) -> MaskOutput:
    return nnx.merge(graphdef, state).decode_masks(features, prompts)

  features = jax.eval_shape(encode, state, image)
  hidden = config.text.hidden_size
  fcs = 2.0 * num_masks * hidden * (hidden + config.sam2.d_model)
  encoder = _encoder_flops(encode, model, state, image)
  return encoder, fcs + traced_flops(decode, state, features, prompts)


def _encoder_flops(
  encode: Callable, model: Sam2, state: nnx.State, image: jax.ShapeDtypeStruct
) -> float:
  """Of the image encoder; its trunk block by block, since a loop's text has every kind of block."""
  trunk = model.image_encoder.trunk
  x, blocks, looped = jax.eval_shape(lambda t, i: t.patch_embed(i), trunk, image), 0.0, 0.0
  for start, stop in trunk.runs:
    run = trunk.blocks[start:stop]
    looped += traced_flops(run_blocks, run, x)
    for block in run:
      blocks += traced_flops(lambda b, x: b(x), block, x)
      x = jax.eval_shape(lambda b, x: b(x), block, x)
  return traced_flops(encode, state, image) - looped + blocks


def traced_flops(function: Callable, *args: Any) -> float:
  """Of the matrix products and convolutions of a traced function."""
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _flops(jaxpr: core.Jaxpr) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = _shape(eqn.invars[0])
      total += 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(shape[i] for i in contracted)
    elif name == "conv_general_dilated":
      numbers = eqn.params["dimension_numbers"]
      kernel = _shape(eqn.invars[1])
      per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
      if any(d > 1 for d in eqn.params["lhs_dilation"]):  # transposed: an input meets each weight
        per_output //= math.prod(eqn.params["lhs_dilation"])
      total += 2.0 * math.prod(_shape(eqn.outvars[0])) * per_output
    times = eqn.params["length"] if name == "scan" else 1
    total += times * sum(_flops(inner) for inner in core.jaxprs_in_params(eqn.params))
  return total


@dataclass(frozen=True)
class StepFlops:
  """Model FLOPs of a training step, by part."""

  parts: dict[str, float]

  @property
  def total(self) -> float:
    """Of all parts."""
    return sum(self.parts.values())


def sft_flops(
  config: ModelConfig, tokens: int, patches: int, num_masks: int, train_all: bool
) -> StepFlops:
  """Forward and backward of one sample.

  A weight that trains costs three forward passes; one that only passes gradients on, two; one
  without gradients, one. Vision tower and SAM 2's encoder have none unless all parameters train.
  """
  text = text_flops(config.text, config.lora.rank, tokens, tokens - 1)
  encoder, decoder = sam2_flops(config, num_masks)
  frozen, passing = (3, 3) if train_all else (1, 2)
  return StepFlops(
    {
      "text linears": passing * text.linears,
      "text LoRA": 3 * text.lora,
      "text attention": 3 * text.attention,
      "output embedding": passing * text.head,
      "vision tower": frozen * vision_flops(config.vision, patches),
      "SAM 2 encoder": frozen * encoder,
      "mask decoder": 3 * decoder,
    }
  )


def prefill_flops(config: ModelConfig, tokens: int, patches: int) -> StepFlops:
  """Of one prompt, up to the logits of its last token; adapters are merged."""
  text = text_flops(config.text, 0, tokens, 1)
  return StepFlops(
    {
      "text linears": text.linears,
      "text attention": text.attention,
      "output embedding": text.head,
      "vision tower": vision_flops(config.vision, patches),
    }
  )


def decode_flops(config: ModelConfig, prompt: int, new_tokens: int) -> StepFlops:
  """Of one sample after its prefill; the last token is not fed. Adapters are merged."""
  fed = new_tokens - 1
  text = text_flops(config.text, 0, fed, fed)
  return StepFlops(
    {
      "text linears": text.linears,
      "text attention": attention_flops(
        config.text, group_pairs(prompt, 1, fed) - group_pairs(prompt, 0, 0)
      ),
      "output embedding": text.head,
    }
  )


def rollout_flops(config: ModelConfig, grpo: GrpoConfig, tokens: int, patches: int) -> StepFlops:
  """Of one prompt and its group, every sample at max_new_tokens; the last token is not fed."""
  g, fed = grpo.group_size, grpo.max_new_tokens - 1
  text = text_flops(config.text, config.lora.rank, tokens + g * fed, 1 + g * fed)
  encoder, decoder = sam2_flops(config, g * grpo.max_masks)
  return StepFlops(
    {
      "text linears": text.linears,
      "text LoRA": text.lora,
      "text attention": attention_flops(config.text, group_pairs(tokens, g, fed)),
      "output embedding": text.head,
      "vision tower": vision_flops(config.vision, patches),
      "SAM 2 encoder": encoder,
      "mask decoder": decoder,
    }
  )


def grpo_flops(
  config: ModelConfig, grpo: GrpoConfig, tokens: int, train_decoder: bool
) -> StepFlops:
  """Forward and backward of an update on one prompt and its group, counted as in `sft_flops`.

  Features of pictures come from the rollout. A KL term adds a forward pass without adapters.
  """
  g, n = grpo.group_size, grpo.max_new_tokens
  text = text_flops(config.text, config.lora.rank, tokens + g * n, g * n)
  attention = attention_flops(config.text, group_pairs(tokens, g, n))
  _, decoder = sam2_flops(config, grpo.max_masks)
  reference = int(grpo.kl_weight > 0)
  return StepFlops(
    {
      "text linears": (2 + reference) * text.linears,
      "text LoRA": 3 * text.lora,
      "text attention": (3 + reference) * attention,
      "output embedding": (2 + reference) * text.head,
      "mask decoder": (3 if train_decoder else 2) * decoder * (grpo.mask_loss != "off"),
    }
  )
