"""Two requests answered by a PyTorch Sa2VA made of transformers and by ours, stage by stage."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from PIL import Image
from transformers import AutoTokenizer

from converters.torch_reference import TorchSa2VA
from tests.parity.sam2_weights import balance_iou_head
from tests.parity.torch_sa2va import our_sa2va, random_torch_sa2va
from tests.pictures import first_resize, hf_processor
from vrt_jax.config import (
  EvalConfig,
  ImageConfig,
  ModelConfig,
  Sam2Config,
  TextConfig,
  VisionConfig,
)
from vrt_jax.data.chat import VRT_TOKENS, ChatTokenizer
from vrt_jax.data.image import decode_image
from vrt_jax.data.trace import evaluation_user_text
from vrt_jax.data.transforms import Prompt, make_prompt, pad_inputs
from vrt_jax.generate.decode import GenerationInputs, TokenIds
from vrt_jax.generate.generation import Generation, generate
from vrt_jax.generate.predictor import Prediction, Predictor, Request
from vrt_jax.generate.sampling import Sampling
from vrt_jax.model_directory import Loaded

NEW_TOKENS = 64
PROMPT_BUCKET = (144, 100)
POSITION_SIDE = 5
MAX_MASKS = 12
IMAGE = ImageConfig(
  min_pixels=96 * 96, max_pixels=160 * 160, inference_factor_px=28, grounding_size_px=1024
)
MODEL = ModelConfig(
  vision=VisionConfig(
    depth=3,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    patch_size=16,
    num_position_embeddings=POSITION_SIDE**2,
    out_hidden_size=48,
    deepstack_indexes=(0, 1),
  ),
  text=TextConfig(
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    mrope_section=(4, 2, 2),
    tie_embeddings=False,
  ),
  sam2=Sam2Config(
    image_size_px=1024,
    embed_dim=8,
    stages=(1, 1, 2, 1),
    global_attention_blocks=(3,),
    window_spec=(8, 4, 16, 8),
    d_model=32,
    decoder_mlp_dim=48,
    iou_head_hidden_dim=24,
  ),
)
PROMPT = (
  "<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>\n{question}\n\n"
  "You should first think about the reasoning process in the mind and then provides the user with"
  " the answer. Please respond with segmentation mask in both the thinking process and the answer."
  "\n\nThe reasoning process and answer are enclosed within <think> </think> and <answer> </answer>"
  " tags, respectively, i.e., <think> reasoning process here </think> <answer> answers here"
  " </answer>.<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Case:
  """Two requests and a random model that says [SEG] now and then."""

  tokenizer_dir: Path
  requests: list[Request]
  seed: int
  seg_gain: float
  """Factor of the head's [SEG] row: the larger, the more often it wins."""


@dataclass(frozen=True)
class Reference:
  """What PyTorch makes of one request."""

  tokens: list[int]
  seg_states: torch.Tensor
  """[M, D], before the final norm, where [SEG] was an input."""
  iou: np.ndarray
  low_res_masks: np.ndarray
  post_norm_masks: np.ndarray
  """Low-resolution masks from the normed states: a control."""
  logits: np.ndarray
  """[M, Y, X] at picture size, through 1024."""
  direct_logits: np.ndarray
  """The same from 256 straight to picture size: a control."""


def interpolate(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
  """[M, Y, X] bilinearly to another size."""
  return F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]


def generate_torch(model: TorchSa2VA, tokenizer, image: Image.Image, question: str) -> torch.Tensor:
  """The prompt and NEW_TOKENS greedy tokens, [T]; the model remembers its states."""
  seen = hf_processor(IMAGE)(images=[first_resize(image)], return_tensors="np")
  pads = "<|image_pad|>" * (len(seen["pixel_values"]) // 4)
  text = PROMPT.format(pads=pads, question=question)
  ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
  image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
  never = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>"]
  never += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
  model.last_layer_outputs.clear()
  return model.qwen.generate(
    input_ids=ids,
    attention_mask=torch.ones_like(ids),
    pixel_values=torch.tensor(seen["pixel_values"]),
    image_grid_thw=torch.tensor(seen["image_grid_thw"]),
    mm_token_type_ids=(ids == image_token).int(),
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
    eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    suppress_tokens=tokenizer.convert_tokens_to_ids(never),
  )[0]


def reference(model: TorchSa2VA, tokenizer, request: Request) -> Reference:
  """Text, [SEG] states and masks of one request, at every stage."""
  image = decode_image(request.image)
  with torch.no_grad():
    ids = generate_torch(model, tokenizer, image, request.question)
    states = model.states()[0]
    assert len(states) == len(ids) - 1  # the last token is never an input
    at_seg = states[ids[:-1] == tokenizer.convert_tokens_to_ids("[SEG]")]
    maps = model.image_maps(np.asarray(image.resize((1024, 1024))))
    masks, iou = model.best_masks(maps, at_seg)
    post_norm = model.best_masks(maps, model.qwen.model.language_model.norm(at_seg))[0]
    size = (image.height, image.width)
    return Reference(
      tokens=ids[-NEW_TOKENS:].tolist(),
      seg_states=at_seg,
      iou=iou.numpy(),
      low_res_masks=masks.numpy(),
      post_norm_masks=post_norm.numpy(),
      logits=interpolate(interpolate(masks, (1024, 1024)), size).numpy(),
      direct_logits=interpolate(masks, size).numpy(),
    )


def random_torch_model(case: Case, config: ModelConfig, tokenizer: ChatTokenizer) -> TorchSa2VA:
  """Random parameters under which [SEG] is said and each of the three masks can be the best."""
  model = random_torch_sa2va(config, tokenizer.image_pad_id, case.seed)
  with torch.no_grad():
    model.qwen.lm_head.weight[tokenizer.seg_id] *= case.seg_gain
    maps = model.image_maps(np.asarray(decode_image(case.requests[0].image).resize((1024, 1024))))
    states = 4 * torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    iou = model.decode(maps, states)[1]
    balance_iou_head(model.sam2, iou)
  return model


def prompts(case: Case, tokenizer: ChatTokenizer, inference: bool = True) -> list[Prompt]:
  """Our prompts; without `inference` the first resize of pictures is missing, a control."""
  return [
    make_prompt(r.image, evaluation_user_text(r.question), tokenizer, IMAGE, inference=inference)[0]
    for r in case.requests
  ]


def our_generation(
  loaded: Loaded, made: list[Prompt], rope_deltas: np.ndarray | None = None
) -> Generation:
  """Both requests in one batch, the prompts right-padded; other rope deltas are a control."""
  tokenizer = loaded.tokenizer
  text, vision, deltas = pad_inputs(made, PROMPT_BUCKET, tokenizer, IMAGE, POSITION_SIDE)
  out = generate(
    *nnx.split(loaded.model),
    GenerationInputs(
      text=text,
      vision=vision,
      rope_deltas=deltas if rope_deltas is None else rope_deltas,
      grounding_image=np.stack([p.grounding_image for p in made]),
    ),
    jax.random.key(0),
    max_new_tokens=NEW_TOKENS,
    max_masks=MAX_MASKS,
    sampling=Sampling(),
    ids=TokenIds(
      seg=tokenizer.seg_id,
      end=tokenizer.im_end_id,
      pad=tokenizer.endoftext_id,
      forbidden=tokenizer.never_sample_ids,
    ),
  )
  return jax.device_get(out)


def our_seg_states(loaded: Loaded, made: list[Prompt], tokens: np.ndarray) -> list[np.ndarray]:
  """States before the final norm at [SEG] of a full forward pass over prompt and new tokens."""
  whole = [
    replace(p, input_ids=np.concatenate([p.input_ids, row]).astype(np.int32))
    for p, row in zip(made, tokens, strict=True)
  ]
  bucket = (PROMPT_BUCKET[0] + NEW_TOKENS, PROMPT_BUCKET[1])
  text, vision, _ = pad_inputs(whole, bucket, loaded.tokenizer, IMAGE, POSITION_SIDE)
  hidden = np.asarray(
    jax.jit(lambda model, *inputs: model(*inputs))(loaded.model.qwen, text, vision)
  )
  states = []
  for row, sample in zip(hidden, whole, strict=True):
    positions = np.flatnonzero(sample.input_ids[:-1] == loaded.tokenizer.seg_id)
    states.append(row[positions])
  return states


@dataclass(frozen=True)
class Results:
  """Both worlds' answers to the same requests."""

  references: list[Reference]
  generation: Generation
  wrong_tokens: dict[str, np.ndarray]
  """What ours says with a part left out: controls."""
  seg_states: list[np.ndarray]
  predictions: list[Prediction]


def answer(case: Case) -> Results:
  """Runs both; all weights come from the PyTorch side."""
  tokenizer = ChatTokenizer.from_dir(case.tokenizer_dir)
  hf_tokenizer = AutoTokenizer.from_pretrained(case.tokenizer_dir)
  hf_tokenizer.add_tokens(list(VRT_TOKENS), special_tokens=True)
  config = replace(MODEL, text=replace(MODEL.text, vocab_size=tokenizer.vocab_size))
  model = random_torch_model(case, config, tokenizer)
  loaded = Loaded(our_sa2va(config, model), tokenizer, IMAGE)
  evaluation = EvalConfig(
    batch_size=2,
    max_new_tokens=NEW_TOKENS,
    max_masks=MAX_MASKS,
    prompt_buckets=(PROMPT_BUCKET,),
  )
  made = prompts(case, tokenizer)
  generation = our_generation(loaded, made)
  wrong = {
    "no rope delta": our_generation(loaded, made, np.zeros(2, np.int32)),
    "no first resize": our_generation(loaded, prompts(case, tokenizer, inference=False)),
  }
  return Results(
    references=[reference(model, hf_tokenizer, r) for r in case.requests],
    generation=generation,
    wrong_tokens={name: out.tokens for name, out in wrong.items()},
    seg_states=our_seg_states(loaded, made, generation.tokens),
    predictions=list(Predictor(loaded, evaluation).predict(case.requests)),
  )
