"""One random Qwen3-VL in both worlds, with padded inputs and what transformers makes of them."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import numpy as np
import torch
from flax import nnx
from transformers import Qwen3VLForConditionalGeneration

from tests.parity.qwen3_vl_weights import hf_config, load_weights, random_torch_model
from vrt_jax.config import ModelConfig, TextConfig, VisionConfig
from vrt_jax.data.positions import mrope_position_ids, vision_layout, visual_index
from vrt_jax.models.qwen3_vl.model import Qwen3VL
from vrt_jax.types import TextInputs, VisionInputs

SEG = 81
IMAGE = 90
GRIDS = [[(1, 4, 6), (1, 6, 2)], [(1, 2, 8)]]
ALL_GRIDS = [grid for grids in GRIDS for grid in grids]
NUM_PATCHES = 40
POSITION_SIDE = 5

TINY = ModelConfig(
  vision=VisionConfig(
    depth=4,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    patch_size=4,
    num_position_embeddings=POSITION_SIDE**2,
    out_hidden_size=40,
    deepstack_indexes=(0, 2),
  ),
  text=TextConfig(
    vocab_size=96,
    hidden_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=56,
    rope_theta=5e4,
    mrope_section=(4, 2, 2),
  ),
)


@dataclass(frozen=True)
class Reference:
  """What transformers computes, with every block's input and output by forward hooks."""

  logits: np.ndarray
  final_states: np.ndarray
  """`hidden_states[-1]` of transformers 5, which is after the final norm."""
  vision_tokens: np.ndarray
  deepstack: list[np.ndarray]
  vision_blocks: list[tuple[np.ndarray, np.ndarray]]
  decoder_layers: list[tuple[np.ndarray, np.ndarray]]

  @property
  def hidden_states(self) -> np.ndarray:
    """Output of the last decoder layer, before the final norm."""
    return self.decoder_layers[-1][1]


def sample_ids() -> list[np.ndarray]:
  """Two prompts of different length, with two images and with one, two [SEG] in each."""
  rng = np.random.default_rng(1)
  rows = []
  for grids in GRIDS:
    parts = [rng.integers(1, 80, 3)]
    for _, h, w in grids:
      parts += [np.full(h * w // 4, IMAGE), rng.integers(1, 80, 4)]
    rows.append(np.concatenate([*parts, [SEG, 5, SEG, 9]]).astype(np.int32))
  return rows


def make_inputs(config: ModelConfig) -> tuple[TextInputs, VisionInputs]:
  """The prompts right-padded, their images packed sample by sample."""
  rng = np.random.default_rng(2)
  rows, merge = sample_ids(), config.vision.spatial_merge_size
  length = max(map(len, rows)) + 2
  text = TextInputs(
    np.zeros((2, length), np.int32),
    np.zeros((2, length), bool),
    np.zeros((3, 2, length), np.int32),
    np.full((2, length), -1, np.int32),
  )
  layouts = []
  for i, (ids, grids) in enumerate(zip(rows, GRIDS, strict=True)):
    n = len(ids)
    text.input_ids[i, :n], text.token_mask[i, :n] = ids, True
    text.position_ids[:, i, :n] = mrope_position_ids(ids, grids, IMAGE, merge)[0]
    text.visual_index[i, :n] = visual_index(ids, IMAGE)
    layouts.append(vision_layout(grids, NUM_PATCHES, merge, POSITION_SIDE))
  pixels = rng.integers(0, 256, (2, NUM_PATCHES, config.vision.patch_dim)).astype(np.uint8)
  fields = (np.stack(field) for field in zip(*layouts, strict=True))
  return text, VisionInputs(pixels, *fields)


def normalised(vision: VisionInputs) -> np.ndarray:
  """Pixels as the image processor gives them: [B, P, C], about -1 .. 1."""
  return (vision.pixel_values.astype(np.float32) - 127.5) / 127.5


def record(modules: torch.nn.ModuleList) -> list[tuple[np.ndarray, np.ndarray]]:
  """A list that each later forward pass of a module extends by its (input, output)."""
  calls = []
  for module in modules:
    module.register_forward_hook(
      lambda _, args, output: calls.append((args[0].numpy(), output.numpy()))
    )
  return calls


def forward_torch(
  model: Qwen3VLForConditionalGeneration,
  input_ids: np.ndarray,
  token_mask: np.ndarray,
  vision: VisionInputs | None,
) -> torch.nn.Module:
  """transformers' forward pass; padding stands where `token_mask` says, left or right."""
  images = {}
  if vision is not None:
    images = {
      "pixel_values": torch.tensor(normalised(vision)[vision.patch_segments > 0]),
      "image_grid_thw": torch.tensor(ALL_GRIDS),
      "mm_token_type_ids": torch.tensor(input_ids == IMAGE, dtype=torch.int),
    }
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(input_ids, dtype=torch.long),
      attention_mask=torch.tensor(token_mask, dtype=torch.long),
      output_hidden_states=True,
      **images,
    )


@functools.cache
def setup(
  tied: bool = True,
) -> tuple[Qwen3VL, Qwen3VLForConditionalGeneration, TextInputs, VisionInputs, Reference]:
  """Our model, the one of transformers, the inputs and what transformers makes of them."""
  config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tie_embeddings=tied))
  torch_model = random_torch_model(hf_config(config, IMAGE))
  model = nnx.eval_shape(lambda: Qwen3VL(config, nnx.Rngs(0)))
  load_weights(model, torch_model.state_dict())
  text, vision = make_inputs(config)
  blocks = record(torch_model.model.visual.blocks)
  layers = record(torch_model.model.language_model.layers)
  out = forward_torch(torch_model, text.input_ids, text.token_mask, vision)
  blocks, layers = list(blocks), list(layers)  # later passes extend the recorded lists
  with torch.no_grad():
    tower = torch_model.model.visual(
      torch.tensor(normalised(vision)[vision.patch_segments > 0]), grid_thw=torch.tensor(ALL_GRIDS)
    )
  reference = Reference(
    logits=out.logits.numpy(),
    final_states=out.hidden_states[-1].numpy(),
    vision_tokens=tower.pooler_output.numpy(),
    deepstack=[feature.numpy() for feature in tower.deepstack_features],
    vision_blocks=blocks,
    decoder_layers=layers,
  )
  return model, torch_model, text, vision, reference


def layer_at(stacked: nnx.Module, index: int) -> nnx.Module:
  """One module of a stack whose parameters have a leading axis L."""
  graphdef, state = nnx.split(stacked)
  return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], state))


def run(
  model: Qwen3VL, text: TextInputs, vision: VisionInputs | None
) -> tuple[np.ndarray, np.ndarray]:
  """Our hidden states before the final norm, and logits."""

  def forward(model, text, vision):
    hidden = model(text, vision)
    return hidden, model.language_model.logits(hidden)

  return tuple(np.asarray(a) for a in jax.jit(forward)(model, text, vision))
