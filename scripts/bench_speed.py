"""Stages of the model beside PyTorch: the same weights, inputs, float32 and cores, in turns.

PyTorch's side is transformers' Qwen3-VL and SAM 2 (`converters/torch_reference.py`). Each function
gives a line of results; `ratio` is PyTorch's time by ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from scripts.bench_model import MODEL, Subject
from scripts.bench_runs import gemm_gflops, medians, memory_gbytes
from vrt_jax.config import ComputeDtype, Sam2Config

if TYPE_CHECKING:  # JAX is loaded after --help
  from converters.torch_speed import TorchSide
  from vrt_jax.generate.decode import GenerationInputs
  from vrt_jax.models.qwen3_vl.cache import KVCache
  from vrt_jax.models.sam2.model import ImageFeatures, MaskOutput

LANGUAGE = replace(MODEL, sam2=Sam2Config())
"""A tiny SAM 2, where only the language half is measured."""
LONG = ((896, 1792), 300)
"""(height, width) and text tokens of the reference's longest prompt: 1568 visual tokens."""
PREDICT_TOKENS, PREDICT_MASKS, PICTURE_SIZE = 128, 5, (1024, 1024)


@dataclass(frozen=True)
class SpeedArgs:
  """Measures stages of a model of middle size beside PyTorch."""

  repeats: int = 5
  new_tokens: int = 128
  """Of decoding."""


def prefill(args: SpeedArgs, subject: Subject) -> dict:
  """Vision tower and prompt up to the last token's logits."""
  import jax
  from flax import nnx

  from scripts.model_flops import prefill_flops
  from vrt_jax.generate.decode import last_states, read_prompts
  from vrt_jax.models.stacks import with_layers_apart

  prompt = subject.prompt()
  inputs = subject.inputs(prompt)
  graphdef, params = nnx.split(subject.model)
  params = with_layers_apart(params)

  @jax.jit
  def run(params: "nnx.State", inputs: "GenerationInputs") -> "tuple[KVCache, jax.Array]":
    model = nnx.merge(graphdef, params)
    visual = model.qwen.visual_features(inputs.vision, model.dtype)
    cache, hidden = read_prompts(model, inputs.text, visual)
    return cache, model.qwen.language_model.logits(last_states(hidden, inputs.text.token_mask))

  theirs = torch_side(subject)
  runs = {
    "jax": lambda: jax.block_until_ready(run(params, inputs)),
    "torch": lambda: theirs.prefill(prompt),
  }
  ours, reference = np.asarray(run(params, inputs)[1][0]), theirs.prefill(prompt)
  flops = prefill_flops(subject.config, len(prompt.input_ids), len(prompt.patches)).total
  found = compared(runs, args.repeats)
  limit = gemm_gflops()
  return found | {
    "tokens": len(prompt.input_ids),
    "patches": len(prompt.patches),
    "error": float(np.abs(ours - reference).max() / np.abs(reference).max()),
    "gflops": round(flops / 1e9),
    "of_gemm_limit": round(flops / found["jax"] / 1e9 / limit, 2),
    "gemm_gflops": round(limit),
  }


def decode(args: SpeedArgs, subject: Subject, rows: int, dtype: ComputeDtype = "float32") -> dict:
  """A token of `rows` sequences with a KV cache: what `new_tokens` more cost than one, each."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from vrt_jax.generate.decode import TokenIds
  from vrt_jax.generate.generation import write_text
  from vrt_jax.generate.sampling import Sampling
  from vrt_jax.models.stacks import with_layers_apart

  prompt = subject.prompt()
  inputs = subject.inputs(prompt, rows)
  model = nnx.merge(*nnx.split(subject.model))
  model.config = replace(model.config, compute_dtype=dtype)
  graphdef, params = nnx.split(model)
  params = with_layers_apart(jax.tree.map(lambda x: x.astype(dtype), params))
  tokenizer = subject.tokenizer
  never = -1  # no token ends a sample
  ids = TokenIds(tokenizer.seg_id, never, tokenizer.endoftext_id, tokenizer.never_sample_ids)

  def ours(count: int) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
      text, _ = write_text(
        graphdef,
        params,
        inputs,
        jax.random.key(0),
        max_new_tokens=count,
        max_masks=1,
        sampling=Sampling(),
        ids=ids,
      )
      return np.asarray(jax.block_until_ready(text).tokens)

    return run

  theirs = torch_side(subject)
  counts = (1, 1 + args.new_tokens)
  runs = {f"jax_{n}": ours(n) for n in counts}
  runs |= {f"torch_{n}": partial(theirs.generate, prompt, rows, n) for n in counts}
  if dtype == "bfloat16":
    half = torch_side(subject).to_bfloat16()
    runs |= {f"torch16_{n}": partial(half.generate, prompt, rows, n) for n in counts}
  seconds = medians(runs, args.repeats)
  a_token = {
    side: (seconds[f"{side}_{counts[1]}"] - seconds[f"{side}_1"]) / args.new_tokens
    for side in ("jax", "torch", "torch16")
    if f"{side}_1" in seconds
  }
  language = nnx.state(subject.model.qwen.language_model, nnx.Param)
  size = sum(x.size for x in jax.tree.leaves(language)) * jnp.dtype(dtype).itemsize
  reference = min(v for k, v in a_token.items() if k != "jax")
  limit = memory_gbytes()
  same = np.array_equal(ours(counts[1])(), theirs.generate(prompt, rows, counts[1]))
  return {
    "unit": "s a token",
    "jax": round(a_token["jax"], 4),
    "torch": round(reference, 4),
    "ratio": round(reference / a_token["jax"], 2),
    "rows": rows,
    "same_text": bool(same),
    "gbytes_a_second": round(size / a_token["jax"] / 1e9, 1),
    "of_memory_limit": round(size / a_token["jax"] / 1e9 / limit, 2),
    "memory_gbytes": round(limit, 1),
    "repeats": args.repeats,
  }


def predict(args: SpeedArgs, subject: Subject, encode_once: bool) -> dict:
  """From a prompt to text and masks at picture size: 128 tokens, 5 [SEG].

  A random model says no [SEG], so a token that its greedy text repeats stands for it. PyTorch
  encodes the picture for every [SEG] as the reference does, or once (`encode_once`).
  """
  import jax
  from flax import nnx

  from vrt_jax.generate.decode import TokenIds
  from vrt_jax.generate.generation import generate
  from vrt_jax.generate.predictor import binary_masks
  from vrt_jax.generate.sampling import Sampling
  from vrt_jax.models.stacks import with_layers_apart

  prompt, tokenizer = subject.prompt(), subject.tokenizer
  graphdef, params = nnx.split(subject.model)
  params = with_layers_apart(params)
  theirs = torch_side(subject)
  seg = repeated_token(theirs.generate(prompt, 1, PREDICT_TOKENS)[0], PREDICT_MASKS)
  never = -1  # no token ends a sample
  ids = TokenIds(seg, never, tokenizer.endoftext_id, tokenizer.never_sample_ids)

  def ours() -> np.ndarray:
    out = generate(
      graphdef,
      params,
      subject.inputs(prompt),
      jax.random.key(0),
      max_new_tokens=PREDICT_TOKENS,
      max_masks=PREDICT_MASKS,
      sampling=Sampling(),
      ids=ids,
    )
    masks = np.asarray(out.low_res_masks[0, : int(out.num_segs[0])])
    return binary_masks(masks, subject.config.sam2.image_size_px, PICTURE_SIZE)

  def reference() -> np.ndarray:
    return theirs.predict(
      prompt, PREDICT_TOKENS, seg, PREDICT_MASKS, PICTURE_SIZE, encode_once=encode_once
    )

  differ = np.mean(ours() != reference())
  return compared({"jax": ours, "torch": reference}, args.repeats) | {
    "new_tokens": PREDICT_TOKENS,
    "masks": PREDICT_MASKS,
    "pixels_that_differ": float(differ),
  }


def repeated_token(tokens: np.ndarray, count: int) -> int:
  """A token that is fed at least `count` times; ValueError where the text has none."""
  ids, counts = np.unique(tokens[:-1], return_counts=True)
  if counts.max() < count:
    raise ValueError(f"the random model repeats no token {count} times")
  return int(ids[np.argmax(counts >= count)])


def sam2_encode(args: SpeedArgs, subject: Subject) -> dict:
  """SAM 2's image encoder, Hiera-L at 1024."""
  import jax
  from flax import nnx

  from scripts.model_flops import sam2_flops

  image = subject.prompt().grounding_image
  graphdef, params = nnx.split(subject.model.sam2)
  run = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode_image(x, np.float32))
  theirs = torch_side(subject)
  runs = {
    "jax": lambda: jax.block_until_ready(run(params, image[None])),
    "torch": lambda: theirs.image_maps(image),
  }
  ours = run(params, image[None]).stride16[0]
  reference = theirs.image_maps(image)[2][0].permute(1, 2, 0).numpy()
  flops, _ = sam2_flops(subject.config, 1)
  found = compared(runs, args.repeats)
  limit = gemm_gflops()
  return found | {
    "error": float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()),
    "gflops": round(flops / 1e9),
    "of_gemm_limit": round(flops / found["jax"] / 1e9 / limit, 2),
    "gemm_gflops": round(limit),
  }


def mask_decode(args: SpeedArgs, subject: Subject, objects: int) -> dict:
  """SAM 2's mask decoder for the [SEG] states of one picture."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  image = subject.prompt().grounding_image
  graphdef, params = nnx.split(subject.model)
  features = jax.jit(
    lambda params, x: nnx.merge(graphdef, params).sam2.encode_image(x, np.float32)
  )(params, image[None])
  width = subject.config.text.hidden_size
  states = np.random.default_rng(0).standard_normal((objects, width), np.float32)

  @jax.jit
  def run(params: "nnx.State", features: "ImageFeatures", states: np.ndarray) -> "MaskOutput":
    model = nnx.merge(graphdef, params)
    return model.decode_masks(features, jnp.asarray(states)[None])

  theirs = torch_side(subject)
  maps = theirs.image_maps(image)
  runs = {
    "jax": lambda: jax.block_until_ready(run(params, features, states)),
    "torch": lambda: theirs.masks(maps, states),
  }
  ours = np.asarray(run(params, features, states).low_res_masks[0])
  expected = theirs.masks(maps, states)
  error = float(np.abs(ours - expected).max() / np.abs(expected).max())
  return compared(runs, args.repeats) | {"objects": objects, "error": error}


def measure_speed(name: str, args: SpeedArgs) -> dict:
  """The line of a measurement of `SPEED_NAMES`."""
  return {"name": name} | MEASUREMENTS[name](args)


def torch_side(subject: Subject) -> "TorchSide":
  """The same model in PyTorch."""
  from converters.torch_speed import TorchSide

  return TorchSide(subject.model, subject.tokenizer)


def compared(runs: dict[str, Callable[[], object]], repeats: int) -> dict:
  """Medians of both sides and their ratio."""
  seconds = medians(runs, repeats)
  return {
    "unit": "s",
    "jax": round(seconds["jax"], 4),
    "torch": round(seconds["torch"], 4),
    "ratio": round(seconds["torch"] / seconds["jax"], 2),
    "repeats": repeats,
  }


MEASUREMENTS: dict[str, Callable[[SpeedArgs], dict]] = {
  "predict_reference": lambda args: predict(args, Subject(MODEL), encode_once=False),
  "predict_fair": lambda args: predict(args, Subject(MODEL), encode_once=True),
  "prefill": lambda args: prefill(args, Subject(LANGUAGE)),
  "prefill_long": lambda args: prefill(args, Subject(LANGUAGE, *LONG)),
  "decode_b1": lambda args: decode(args, Subject(LANGUAGE), 1),
  "decode_b1_bf16": lambda args: decode(args, Subject(LANGUAGE), 1, "bfloat16"),
  "decode_b8": lambda args: decode(args, Subject(LANGUAGE), 8),
  "sam2_encode": lambda args: sam2_encode(args, Subject(MODEL)),
  "mask_decode": lambda args: mask_decode(args, Subject(MODEL), 5),
  "mask_decode_40": lambda args: mask_decode(args, Subject(MODEL), 40),
}
SPEED_NAMES = tuple(MEASUREMENTS)
