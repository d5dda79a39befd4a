"""Text and masks of a batch of prompts, in three programs.

`write_text` makes tokens and [SEG] states of prompts, `encode_images` features of their pictures,
and `decode_masks` masks of both. Another bucket of prompts compiles the first alone.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import flax.struct
import jax
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh
from jaxtyping import Float, Int32, Key, UInt8

from vrt_jax.generate.decode import (
  GenerationInputs,
  TokenIds,
  decode,
  prefill,
  row_keys,
  token_lengths,
)
from vrt_jax.generate.sampling import Sampling
from vrt_jax.models.sam2.model import ImageFeatures, MaskOutput
from vrt_jax.ops.sharding import on_mesh, on_one_cpu


class Text(flax.struct.PyTreeNode):
  """New tokens."""

  tokens: Int32[Array, "B N"]
  """Generated ids; positions after the end token hold the pad id."""
  lengths: Int32[Array, "B"]
  """Number of generated ids, the end token included."""
  num_segs: Int32[Array, "B"]
  """[SEG] with a hidden state, prompt included; those beyond M have no mask."""


class Generation(Text):
  """New tokens and the masks of all [SEG] that were inputs."""

  low_res_masks: Float[Array, "B M Y X"]
  iou_pred: Float[Array, "B M"]


@partial(jax.jit, static_argnames=("max_new_tokens", "max_masks", "sampling", "ids", "mesh"))
def write_text(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  inputs: GenerationInputs,
  key: Key[Array, ""],
  *,
  max_new_tokens: int,
  max_masks: int,
  sampling: Sampling,
  ids: TokenIds,
  mesh: AbstractMesh | None = None,
) -> tuple[Text, Float[Array, "B M D"]]:
  """The text, and the states before the final norm of all [SEG] that were inputs.

  Arguments as of `generate`.
  """
  with on_mesh(mesh):
    model = nnx.merge(graphdef, params)
    state, logits = prefill(model, inputs, max_new_tokens, max_masks, ids)
    state = state.replace(keys=row_keys(key, logits.shape[0], 1))
    state = decode(model, state, logits, sampling, ids)
    tokens = state.tokens[:, 0]
    text = Text(tokens, token_lengths(tokens, ids.end), state.num_segs[:, 0])
    return text, state.seg_hidden[:, 0]


@partial(jax.jit, static_argnames="mesh")
def encode_images(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  grounding_image: UInt8[Array, "B Y X 3"],
  *,
  mesh: AbstractMesh | None = None,
) -> ImageFeatures:
  """SAM 2's image encoder, once an image."""
  with on_mesh(mesh):
    model = nnx.merge(graphdef, params)
    return model.sam2.encode_image(grounding_image, model.dtype)


@partial(jax.jit, static_argnames="mesh")
def decode_masks(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  features: ImageFeatures,
  seg_hidden: Float[Array, "B M D"],
  *,
  mesh: AbstractMesh | None = None,
) -> MaskOutput:
  """One mask a [SEG] state."""
  with on_mesh(mesh):
    return nnx.merge(graphdef, params).decode_masks(features, seg_hidden)


def generate(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  inputs: GenerationInputs,
  key: Key[Array, ""],
  *,
  max_new_tokens: int,
  max_masks: int,
  sampling: Sampling,
  ids: TokenIds,
  mesh: AbstractMesh | None = None,
) -> Generation:
  """Text and low-resolution mask logits for a batch of prompts.

  `mesh` is the one over which parameters and inputs are divided. On one CPU pictures are encoded
  while text is written: the one waits for arithmetic, the other for memory.
  """

  def write() -> tuple[Text, Float[Array, "B M D"]]:
    return write_text(
      graphdef,
      params,
      inputs,
      key,
      max_new_tokens=max_new_tokens,
      max_masks=max_masks,
      sampling=sampling,
      ids=ids,
      mesh=mesh,
    )

  def encode() -> ImageFeatures:
    return encode_images(graphdef, params, inputs.grounding_image, mesh=mesh)

  with on_mesh(mesh):
    beside = on_one_cpu()
  if beside:
    with ThreadPoolExecutor(1) as thread:
      encoded = thread.submit(encode)
      (text, seg_hidden), features = write(), encoded.result()
  else:
    (text, seg_hidden), features = write(), encode()
  masks = decode_masks(graphdef, params, features, seg_hidden, mesh=mesh)
  return Generation(**vars(text), low_res_masks=masks.low_res_masks, iou_pred=masks.iou_pred)
