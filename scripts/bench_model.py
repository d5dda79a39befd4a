"""The model of middle size that speed is measured with, the same weights on both sides."""

import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vrt_jax.config import ImageConfig, LoraConfig, ModelConfig, TextConfig, VisionConfig
from vrt_jax.sizes import SAM2_SIZES

if TYPE_CHECKING:  # JAX is loaded after --help
  from vrt_jax.data.chat import ChatTokenizer
  from vrt_jax.data.transforms import Prompt
  from vrt_jax.generate.decode import GenerationInputs
  from vrt_jax.models.sa2va import Sa2VA

POSITION_SIDE = 48
QUESTION = "Which of the things on the table could open the door, and where does it lie?"
TOKENIZER = Path("vrt_jax/assets/shapes_base/tokenizer")
MODEL = ModelConfig(
  vision=VisionConfig(
    depth=12,
    hidden_size=512,
    num_heads=8,
    intermediate_size=2048,
    num_position_embeddings=POSITION_SIDE**2,
    out_hidden_size=1024,
    deepstack_indexes=(2, 5, 8),
  ),
  text=TextConfig(
    vocab_size=151674,
    hidden_size=1024,
    num_layers=12,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=3072,
    mrope_section=(12, 10, 10),
  ),
  sam2=SAM2_SIZES["large"],
)
"""370 M parameters of Qwen3-VL and SAM 2 with Hiera-L."""


@dataclass(frozen=True)
class Subject:
  """A random model in float32, and its tokenizer and preprocessing."""

  config: ModelConfig
  picture_size: tuple[int, int] = (512, 512)
  """(height, width) that the text model sees, multiples of 32: 512 x 512 makes 256 tokens."""
  text_tokens: int = 64
  tokenizer_dir: Path = TOKENIZER

  @cached_property
  def tokenizer(self) -> "ChatTokenizer":
    """The shapes tokenizer: its ids are a part of the vocabulary."""
    from vrt_jax.data.chat import ChatTokenizer

    return ChatTokenizer.from_dir(self.tokenizer_dir)

  @cached_property
  def model(self) -> "Sa2VA":
    """Matrices random, norms of one."""
    from vrt_jax.models.sa2va import abstract_sa2va

    return random_model(abstract_sa2va(self.config))

  @property
  def image(self) -> ImageConfig:
    """Preprocessing to `picture_size`, and SAM 2's input."""
    pixels = self.picture_size[0] * self.picture_size[1]
    side = self.config.sam2.image_size_px
    return ImageConfig(min_pixels=pixels, max_pixels=pixels, grounding_size_px=side)

  @cached_property
  def picture(self) -> bytes:
    """A PNG of coloured noise, twice the size that the text model sees."""
    from PIL import Image

    height, width = self.picture_size
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((2 * width, 2 * height)).save(file, "PNG")
    return file.getvalue()

  @property
  def position_side(self) -> int:
    """Of the learned positions of the vision tower."""
    return int(self.config.vision.num_position_embeddings**0.5)

  def prompt(self) -> "Prompt":
    """The picture and a text of `text_tokens` tokens, those around the picture included."""
    from vrt_jax.data.trace import evaluation_user_text
    from vrt_jax.data.transforms import make_prompt

    user_text = evaluation_user_text(QUESTION, True)
    prompt, _ = make_prompt(self.picture, user_text, self.tokenizer, self.image, inference=True)
    ids = prompt.input_ids
    visual = int(np.sum(ids == self.tokenizer.image_pad_id))
    head = int(np.flatnonzero(ids == self.tokenizer.image_pad_id)[-1]) + 2
    words = np.resize(ids[head:], self.text_tokens + visual - head)
    return replace(prompt, input_ids=np.concatenate([ids[:head], words]))

  def inputs(self, prompt: "Prompt", rows: int = 1) -> "GenerationInputs":
    """`rows` times a prompt, as `generate` takes it, without padding."""
    import jax

    from vrt_jax.data.transforms import pad_inputs
    from vrt_jax.generate.decode import GenerationInputs
    from vrt_jax.types import on_host

    bucket = (len(prompt.input_ids), len(prompt.patches))
    prompts = [prompt] * rows
    text, vision, deltas = pad_inputs(
      prompts, bucket, self.tokenizer, self.image, self.position_side
    )
    grounding = on_host(np.stack([p.grounding_image for p in prompts]))
    return jax.device_put(GenerationInputs(text, vision, on_host(deltas), grounding))


def with_lora(config: ModelConfig, rank: int) -> ModelConfig:
  """The same sizes with adapters."""
  return replace(config, lora=LoraConfig(rank=rank, alpha=2.0 * rank))


def random_model(abstract: "Sa2VA") -> "Sa2VA":
  """The model with random matrices and norms of one."""
  import jax.numpy as jnp
  from flax import nnx

  rng = np.random.default_rng(0)
  graphdef, state = nnx.split(abstract)
  filled = []
  for path, variable in nnx.to_flat_state(state):
    shape = variable.get_value().shape
    is_norm = any("norm" in str(part) for part in path) and path[-1] == "weight"
    noise = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
    filled.append((path, variable.replace(jnp.asarray(np.ones_like(noise) if is_norm else noise))))
  return nnx.merge(graphdef, nnx.from_flat_state(filled))
