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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vrt_jax import cli

Stages = dict[str, np.ndarray]

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
FALLBACK_TEXT = " <answer><obj1> [SEG].</answer>"
"""Appended to a text without [SEG], so that there is a mask to compare."""


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


def torch_stages(folder: Path, loaded, args: Args) -> tuple[Stages, list[int]]:
  """Every stage in PyTorch, and the generated ids."""
  import torch

  from converters.config_reader import read_config
  from converters.torch_reference import load_reference, process_image
  from vrt_jax.data.chat import encode_prompt
  from vrt_jax.data.image import decode_image, grounding_image
  from vrt_jax.data.trace import evaluation_user_text

  data, tokenizer, image = args.image.read_bytes(), loaded.tokenizer, loaded.image
  processed = process_image(data, image)
  user_text = evaluation_user_text(args.question, True)
  num_visual = int(np.prod(processed.grid)) // image.merge_size**2
  prompt = encode_prompt(tokenizer, user_text, [num_visual])
  dtype = getattr(torch, args.dtype)
  model = load_reference(folder, read_config(folder), loaded.model.config, dtype)
  pixels = torch.from_numpy(processed.pixel_values).to(dtype)
  vision = {"pixel_values": pixels, "image_grid_thw": torch.tensor([processed.grid])}

  def inputs(ids: list[int]) -> dict:
    row = torch.tensor([ids])
    types = (row == tokenizer.image_pad_id).int()
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "mm_token_type_ids": types}

  with torch.no_grad():
    generated = model.qwen.generate(
      **inputs(prompt),
      **vision,
      do_sample=False,
      max_new_tokens=args.max_new_tokens,
      eos_token_id=tokenizer.im_end_id,
      pad_token_id=tokenizer.endoftext_id,
      suppress_tokens=list(tokenizer.never_sample_ids),
    )[0, len(prompt) :].tolist()
    model.states()
    ids = with_seg(prompt + generated, tokenizer)
    logits = model.qwen(**inputs(ids), **vision).logits[0, len(prompt) - 1 :]
    states = model.states()[0]
    tower = model.qwen.model.visual(pixels, grid_thw=vision["image_grid_thw"])
    seg = states[torch.tensor(ids) == tokenizer.seg_id]
    if loaded.model.config.seg_hidden == "post_norm":
      seg = model.qwen.model.language_model.norm(seg)
    maps = model.image_maps(grounding_image(decode_image(data), image.grounding_size_px))
    masks, iou = model.decode(maps, seg)
    best = masks[torch.arange(len(seg)), iou.argmax(dim=-1)]
    square = (image.grounding_size_px,) * 2
    final = best.float()[:, None]
    for size in (square, processed.size):
      final = torch.nn.functional.interpolate(final, size=size, mode="bilinear")
    stages = {"image patches": processed.pixel_values, "visual tokens": tower.pooler_output}
    stages |= {f"deepstack {i}": x for i, x in enumerate(tower.deepstack_features)}
    stages |= {"hidden states before the norm": states, "logits": logits}
    stages["[SEG] prompts"] = model.text_hidden_fcs(seg)
    stages |= {f"SAM 2 stride {4 * 2**i}": m.permute(0, 2, 3, 1) for i, m in enumerate(maps)}
    stages |= {"mask logits": masks, "predicted IoU": iou, "final mask logits": final[:, 0]}
  out = {k: v if isinstance(v, np.ndarray) else v.float().numpy() for k, v in stages.items()}
  return out, generated


def with_seg(ids: list[int], tokenizer) -> list[int]:
  """The ids, with a [SEG] among them."""
  return ids if tokenizer.seg_id in ids else ids + tokenizer.encode(FALLBACK_TEXT)


def our_stages(loaded, args: Args, generated: list[int]) -> tuple[Stages, str]:
  """The same stages in JAX for the text that PyTorch generated, and our own greedy text."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from vrt_jax.data.image import normalize_patches
  from vrt_jax.data.trace import evaluation_user_text
  from vrt_jax.data.transforms import make_prompt, pad_inputs
  from vrt_jax.ops.attention import AttentionMask
  from vrt_jax.ops.resize import resize_bilinear_numpy

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
  def language(model):
    tokens, deepstack = model.qwen.visual(vision, model.dtype)
    embeds, _ = model.qwen.embed_multimodal(text, vision, model.dtype)
    segments = text.token_mask.astype(np.int32)
    mask = AttentionMask(segments, segments, jnp.arange(len(ids)))
    states, _ = model.qwen.language_model.hidden_states(
      embeds, text.position_ids, mask, deepstack, text.visual_index
    )
    logits = model.qwen.language_model.logits(states[0, first:])
    prompts = model.language_embeddings(states[0, seg])
    return tokens[0], deepstack[:, 0], states[0], logits, prompts

  @nnx.jit
  def segment(model, prompts):
    features = model.sam2.encode_image(prompt.grounding_image[None], model.dtype)
    found = model.sam2.decode_prompts(features, model.sam2.language_prompt(prompts[None]))
    return features, found.masks[0, :, 1:], found.iou_pred[0, :, 1:]

  tokens, deepstack, states, logits, prompts = language(model)
  features, masks, iou = segment(model, prompts)
  best = np.asarray(masks)[np.arange(len(seg)), np.argmax(np.asarray(iou), axis=-1)]
  square = resize_bilinear_numpy(best, (image.grounding_size_px,) * 2)
  stages = {"image patches": normalize_patches(prompt.patches), "visual tokens": tokens}
  stages |= {f"deepstack {i}": x for i, x in enumerate(deepstack)}
  stages |= {"hidden states before the norm": states, "logits": logits, "[SEG] prompts": prompts}
  strides = {"4": features.stride4, "8": features.stride8, "16": features.stride16}
  stages |= {f"SAM 2 stride {name}": x for name, x in strides.items()}
  final = resize_bilinear_numpy(square, size)
  stages |= {"mask logits": masks, "predicted IoU": iou, "final mask logits": final}
  out = {k: np.asarray(jax.device_get(v), np.float32) for k, v in stages.items()}
  return out, greedy(loaded, args)


def greedy(loaded, args: Args) -> str:
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


def compare(theirs: Stages, ours: Stages, dtype: str) -> Iterator[Row]:
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
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from converters import from_hf, hub
  from vrt_jax import model_directory

  if not args.image.is_file():
    raise ValueError(f"image {args.image} does not exist")
  folder = hub.local_path(args.src, args.revision)
  with tempfile.TemporaryDirectory() as temporary:
    directory = Path(temporary) / "model"
    from_hf.convert(from_hf.Args(src=str(folder), dst=directory))
    config = model_directory.load_abstract(str(directory))
    theirs, their_ids = torch_stages(folder, config, args)
    gc.collect()
    loaded = model_directory.load(str(directory))
  if args.dtype == "bfloat16":
    graphdef, state = nnx.split(loaded.model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    model = nnx.merge(graphdef, state)
    model.config = replace(model.config, compute_dtype="bfloat16")
    loaded = replace(loaded, model=model)
  ours, our_text = our_stages(loaded, args, their_ids)
  their_text = loaded.tokenizer.decode(their_ids)
  return [*compare(theirs, ours, args.dtype), text_row(their_text, our_text, args.dtype)]


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m scripts.parity")
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
