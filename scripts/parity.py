"""python -m scripts.parity: a real checkpoint in PyTorch and here, stage by stage.

python -m scripts.parity --src R-Sa2VA-Qwen3VL-4B-SFT --image photo.jpg --question "Who waits?"
python -m scripts.parity --src DIR --image F --question Q --dtype bfloat16

Runs transformers' Qwen3-VL and SAM 2 with the checkpoint's weights, converts the checkpoint, runs
our model on the same picture and text, and prints a table: stage, largest absolute error, largest
value, tolerance. Exit status 1 where a stage is above its tolerance. Needs the [torch] extra and
transformers; the two models are in memory one after the other.
"""

import gc
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vrt_jax import cli

if TYPE_CHECKING:  # JAX is loaded after --help
  from jax import Array

  from vrt_jax.model_directory import Loaded
  from vrt_jax.models.sa2va import Sa2VA
  from vrt_jax.models.sam2.model import ImageFeatures

TOLERANCES = {
  "float32": {
    "image patches": 0.0,
    "visual tokens": 1e-5,
    "deepstack": 1e-5,
    "SAM 2 stride 4": 1e-5,
    "SAM 2 stride 8": 1e-5,
    "SAM 2 stride 16": 1e-5,
    "other": 1e-4,
  },
  "bfloat16": {"image patches": 0.0, "SAM 2 stride 16": 1e-1, "other": 5e-2},
}
"""Largest absolute error of a stage as a share of its largest value, or of 1 where that is less.
bfloat16 keeps 8 bits: both sides round every activation, in another order."""
MASK_MARGIN = {"float32": 1e-3, "bfloat16": 0.25}
"""Pixels whose logit is that close to zero may fall on either side."""
WORST_PIXEL_SHARE = {"float32": 0.0, "bfloat16": 2e-3}


@dataclass(frozen=True)
class Args:
  """Compares a checkpoint's numbers in PyTorch with ours."""

  src: str
  """Sa2VA export: folder or hub id."""
  image: Path
  question: str
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of weights and activations on both sides."""
  max_new_tokens: int = 64
  revision: str = ""


@dataclass(frozen=True)
class Row:
  """One line of the table."""

  stage: str
  error: float
  largest: float
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether the error is within the tolerance."""
    return self.error <= self.tolerance


def our_stages(
  loaded: "Loaded", args: Args, generated: list[int]
) -> tuple[dict[str, np.ndarray], str]:
  """The same stages in JAX for the text that PyTorch generated, and our own greedy text."""
  import jax
  from flax import nnx

  from converters.torch_stages import with_seg
  from vrt_jax.data.image import normalize_patches
  from vrt_jax.data.trace import evaluation_user_text
  from vrt_jax.data.transforms import make_prompt, pad_inputs
  from vrt_jax.ops.attention_mask import AttentionMask

  tokenizer, image, model = loaded.tokenizer, loaded.image, loaded.model
  prompt, size = make_prompt(
    args.image.read_bytes(),
    evaluation_user_text(args.question, True),
    tokenizer,
    image,
    inference=True,
  )
  ids = np.asarray(with_seg([*prompt.input_ids.tolist(), *generated], tokenizer), np.int32)
  side = int(model.config.vision.num_position_embeddings**0.5)
  whole = replace(prompt, input_ids=ids)
  bucket = (len(ids), len(prompt.patches))
  text, vision, _ = pad_inputs([whole], bucket, tokenizer, image, side)
  first, seg = len(prompt.input_ids) - 1, np.flatnonzero(ids == tokenizer.seg_id)

  @nnx.jit
  def language(model: "Sa2VA") -> tuple["Array", ...]:
    tokens, deepstack = model.qwen.visual(vision, model.dtype)
    embeds, _ = model.qwen.embed_multimodal(text, vision, model.dtype)
    segments = text.token_mask.astype(np.int32)
    mask = AttentionMask.causal(segments, segments)
    states, _ = model.qwen.language_model.hidden_states(
      embeds, text.position_ids, mask, deepstack, text.visual_index
    )
    logits = model.qwen.language_model.logits(states[0, first:])
    prompts = model.language_embeddings(states[0, seg])
    return tokens[0], deepstack[:, 0], states[0], logits, prompts

  tokens, deepstack, states, logits, prompts = language(model)
  stages = {"image patches": normalize_patches(prompt.patches), "visual tokens": tokens}
  stages |= {f"deepstack {i}": x for i, x in enumerate(deepstack)}
  stages |= {"hidden states before the norm": states, "logits": logits, "[SEG] prompts": prompts}
  stages |= _segmentation(model, prompt.grounding_image, prompts, size)
  out = {k: np.asarray(jax.device_get(v), np.float32) for k, v in stages.items()}
  return out, greedy(loaded, args)


def _segmentation(
  model: "Sa2VA", grounding_image: np.ndarray, prompts: "Array", size: tuple[int, int]
) -> dict:
  """From language prompts [M, E] to mask logits at picture size."""
  import jax.numpy as jnp
  from flax import nnx

  from vrt_jax.ops.resize import resize_bilinear_numpy

  @nnx.jit
  def segment(model: "Sa2VA", prompts: "Array") -> tuple["ImageFeatures", "Array", "Array"]:
    features = model.sam2.encode_image(jnp.asarray(grounding_image[None]), model.dtype)
    found = model.sam2.decode_prompts(features, model.sam2.language_prompt(prompts[None]))
    return features, found.masks[0, :, 1:], found.iou_pred[0, :, 1:]

  features, masks, iou = segment(model, prompts)
  best = np.asarray(masks)[np.arange(len(prompts)), np.argmax(np.asarray(iou), axis=-1)]
  square = resize_bilinear_numpy(best, grounding_image.shape[:2])
  return {
    "SAM 2 stride 4": features.stride4,
    "SAM 2 stride 8": features.stride8,
    "SAM 2 stride 16": features.stride16,
    "mask logits": masks,
    "predicted IoU": iou,
    "final mask logits": resize_bilinear_numpy(square, size),
  }


def greedy(loaded: "Loaded", args: Args) -> str:
  """Our own greedy text for the prompt."""
  from vrt_jax.config import EvalConfig
  from vrt_jax.generate.predictor import Predictor, Request, prompt_bucket

  request = Request(args.image.read_bytes(), args.question)
  config = EvalConfig(
    batch_size=1,
    max_new_tokens=args.max_new_tokens,
    prompt_buckets=(prompt_bucket(loaded, request, thinking=True),),
  )
  (prediction,) = Predictor(loaded, config).predict([request])
  return prediction.text


def compare(
  theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], dtype: str
) -> Iterator[Row]:
  """A row a stage, the binary masks last."""
  tolerances = TOLERANCES[dtype]
  for stage, reference in theirs.items():
    if ours[stage].shape != reference.shape:
      raise ValueError(f"{stage}: shape {ours[stage].shape} here, {reference.shape} in PyTorch")
    largest = float(np.abs(reference).max())
    share = tolerances.get(stage, tolerances["other"])
    if stage.startswith("deepstack"):
      share = tolerances.get("deepstack", tolerances["other"])
    error = float(np.abs(ours[stage] - reference).max())
    yield Row(stage, error, largest, share * max(1.0, largest))
  logits, reference = ours["final mask logits"], theirs["final mask logits"]
  differs = ((logits > 0) != (reference > 0)) & (np.abs(reference) >= MASK_MARGIN[dtype])
  yield Row(
    "share of mask pixels that differ", float(differs.mean()), 1.0, WORST_PIXEL_SHARE[dtype]
  )


def text_row(theirs: str, ours: str, dtype: str) -> Row:
  """Characters of the greedy text from the first other one on; in bfloat16 the texts may part."""
  same = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
  same = min(len(theirs), len(ours)) if same is None else same
  longest = max(len(theirs), len(ours))
  different = longest - same
  return Row(
    "greedy characters that differ", different, longest, 0 if dtype == "float32" else longest
  )


def parity(args: Args) -> list[Row]:
  """Runs both sides; a row a stage.

  Raises:
    ValueError: the checkpoint or the picture cannot be used.
  """
  from converters import from_hf, hub, torch_stages
  from vrt_jax import model_directory

  if not args.image.is_file():
    raise ValueError(f"image {args.image} does not exist")
  folder = hub.local_path(args.src, args.revision)
  with tempfile.TemporaryDirectory() as temporary:
    directory = Path(temporary) / "model"
    from_hf.convert(from_hf.Args(src=str(folder), dst=directory))
    config = model_directory.load_abstract(str(directory))
    theirs, their_ids = torch_stages.run(
      folder, config, args.image.read_bytes(), args.question, args.dtype, args.max_new_tokens
    )
    gc.collect()
    loaded = model_directory.load(str(directory), args.dtype)
  ours, our_text = our_stages(loaded, args, their_ids)
  their_text = loaded.tokenizer.decode(their_ids)
  return [*compare(theirs, ours, args.dtype), text_row(their_text, our_text, args.dtype)]


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.parity", __doc__)
  rows = parity(args)
  print(f"{'stage':<36}{'max abs error':>16}{'largest value':>16}{'tolerance':>12}")
  for row in rows:
    mark = "" if row.passed else "  above"
    print(f"{row.stage:<36}{row.error:>16.2e}{row.largest:>16.2e}{row.tolerance:>12.1e}{mark}")
  failed = [row.stage for row in rows if not row.passed]
  if failed:
    raise ValueError(f"{len(failed)} stages above tolerance: {', '.join(failed)}")


if __name__ == "__main__":
  cli.run(main)
