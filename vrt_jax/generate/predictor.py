"""Questions about pictures -> texts with masks at picture size, batch by batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from vrt_jax.config import EvalConfig
from vrt_jax.data.trace import Mention, evaluation_user_text, mentions
from vrt_jax.data.transforms import Prompt, choose_bucket, make_prompt, pad_inputs
from vrt_jax.generate.decode import GenerationInputs, TokenIds
from vrt_jax.generate.generation import generate
from vrt_jax.generate.sampling import Sampling
from vrt_jax.metrics.results import PredictedMask
from vrt_jax.model_directory import Loaded
from vrt_jax.models.stacks import with_layers_apart
from vrt_jax.ops.masks import encode_rle
from vrt_jax.ops.resize import resize_bilinear_numpy
from vrt_jax.placement import fetch, place_params, put_whole_batch, replicate
from vrt_jax.types import on_host


@dataclass(frozen=True)
class Request:
  """A picture (encoded file bytes) and a question."""

  image: bytes
  question: str


@dataclass(frozen=True)
class Prepared:
  """A request as the model takes it."""

  prompt: Prompt
  image_size: tuple[int, int]
  """(height, width) of the picture in pixels."""


@dataclass(frozen=True)
class Prediction:
  """A text, and for each [SEG] with a hidden state its mask."""

  text: str
  mentions: list[Mention]
  masks: Bool[np.ndarray, "M Y X"]
  scores: list[float]
  """Predicted IoU of each mask."""
  truncated: bool
  """True where the text reached the token limit."""

  def objects(self) -> list[PredictedMask]:
    """Masks as COCO RLE with role, phrase and place in the text."""
    return [
      PredictedMask(
        rle=encode_rle(mask),
        role=mention.role,
        index=mention.index,
        phrase=mention.phrase,
        text_span=mention.text_span,
        object_number=mention.object_number,
        score=score,
      )
      for mention, mask, score in zip(self.mentions, self.masks, self.scores, strict=True)
    ]


def binary_masks(
  low_res_masks: Float[np.ndarray, "M Ym Xm"], grounding_size_px: int, image_size: tuple[int, int]
) -> Bool[np.ndarray, "M Y X"]:
  """Mask logits -> masks at picture size, in two bilinear steps as in the reference.

  First to SAM 2's square input, then to (height, width); sigmoid > 0.5 there.
  """
  square = resize_bilinear_numpy(low_res_masks, (grounding_size_px, grounding_size_px))
  return resize_bilinear_numpy(square, image_size) > 0


class Predictor:
  """Generates with one model; programs are compiled once a prompt bucket."""

  def __init__(
    self,
    loaded: Loaded,
    config: EvalConfig,
    *,
    thinking: bool = True,
    sampling: Sampling | None = None,
    seed: int = 0,
    blind: bool = False,
    mesh: Mesh | None = None,
  ):
    """With `mesh`, batches are divided over its devices; config.batch_size must fit them.

    Several processes give the same requests, and each gets all predictions.
    """
    self._loaded = loaded
    self._config = config
    self._thinking = thinking
    self._blind = blind
    self._sampling = sampling or Sampling()
    key = jax.random.key(seed)
    self._key = replicate(key, mesh) if mesh else key
    self._mesh = mesh
    self._graphdef, params = nnx.split(loaded.model)
    self._params = place_params(params, mesh) if mesh else with_layers_apart(params)
    tokenizer = loaded.tokenizer
    self._ids = TokenIds(
      seg=tokenizer.seg_id,
      end=tokenizer.im_end_id,
      pad=tokenizer.endoftext_id,
      forbidden=tokenizer.never_sample_ids,
    )

  def predict(self, requests: Sequence[Request]) -> Iterator[Prediction]:
    """Predictions in the order of the requests.

    Raises:
      ValueError: a picture is corrupt, or a prompt fits no bucket.
    """
    size = self._config.batch_size
    for start in range(0, len(requests), size):
      batch = requests[start : start + size]
      yield from self.answer(
        [prepare(self._loaded, r, self._thinking, blind=self._blind) for r in batch]
      )

  def answer(self, batch: Sequence[Prepared]) -> Iterator[Prediction]:
    """Predictions for at most config.batch_size requests, prepared as this predictor would.

    Raises:
      ValueError: a prompt fits no bucket.
    """
    prompts = [prepared.prompt for prepared in batch]
    self._key, key = jax.random.split(self._key)
    out = generate(
      self._graphdef,
      self._params,
      self._inputs(prompts),
      key,
      max_new_tokens=self._config.max_new_tokens,
      max_masks=self._config.max_masks,
      sampling=self._sampling,
      ids=self._ids,
      mesh=self._mesh.abstract_mesh if self._mesh else None,
    )
    out = fetch(out)
    for i, prepared in enumerate(batch):
      ids = out.tokens[i, : out.lengths[i]].tolist()
      asked = int(np.sum(prompts[i].input_ids == self._ids.seg))  # [SEG] of the question itself
      rows = slice(asked, int(out.num_segs[i]))
      yield self._prediction(
        ids, out.low_res_masks[i, rows], out.iou_pred[i, rows], prepared.image_size
      )

  def _inputs(self, prompts: list[Prompt]) -> GenerationInputs:
    """Padded inputs; a short last batch is filled with copies of its first prompt."""
    fill = self._config.batch_size - len(prompts)
    prompts = prompts + prompts[:1] * fill
    bucket = choose_bucket(prompts, self._config.prompt_buckets)
    side = int(self._loaded.model.config.vision.num_position_embeddings**0.5)
    text, vision, deltas = pad_inputs(
      prompts, bucket, self._loaded.tokenizer, self._loaded.image, side
    )
    grounding = np.stack([p.grounding_image for p in prompts])
    inputs = GenerationInputs(text, vision, on_host(deltas), on_host(grounding))
    return put_whole_batch(inputs, self._mesh) if self._mesh else inputs

  def _prediction(
    self, ids: list[int], low_res: np.ndarray, scores: np.ndarray, image_size: tuple[int, int]
  ) -> Prediction:
    """Text and masks of one row. A [SEG] that is the last token has a mention but no mask."""
    text = self._loaded.tokenizer.decode(ids)
    found = mentions(text)[: len(low_res)]
    if not self._thinking:  # there is no <answer> span; every mask answers
      found = [dataclasses.replace(m, role="answer") for m in found]
    masks = binary_masks(low_res[: len(found)], self._loaded.image.grounding_size_px, image_size)
    return Prediction(
      text=text,
      mentions=found,
      masks=masks,
      scores=[float(s) for s in scores[: len(found)]],
      truncated=self._ids.end not in ids,
    )


BUCKET_STEP = 64
"""Prompt buckets for single questions are multiples of this many tokens and patches."""


def prepare(loaded: Loaded, request: Request, thinking: bool, *, blind: bool = False) -> Prepared:
  """The prompt of a request, its picture decoded and cut into patches.

  Raises:
    ValueError: the picture is corrupt or of an unusable shape, or the question holds a control
      token.
  """
  user_text = evaluation_user_text(request.question, thinking)
  prompt, image_size = make_prompt(
    request.image, user_text, loaded.tokenizer, loaded.image, inference=True, blind=blind
  )
  return Prepared(prompt, image_size)


def prompt_bucket(loaded: Loaded, request: Request, thinking: bool) -> tuple[int, int]:
  """The (tokens, patches) that hold one request, rounded up so that few programs are compiled."""
  return rounded_bucket(prepare(loaded, request, thinking).prompt)


def rounded_bucket(prompt: Prompt) -> tuple[int, int]:
  """The smallest (tokens, patches) that are multiples of `BUCKET_STEP` and hold a prompt."""
  tokens, patches = (-(-len(x) // BUCKET_STEP) for x in (prompt.input_ids, prompt.patches))
  return tokens * BUCKET_STEP, patches * BUCKET_STEP
