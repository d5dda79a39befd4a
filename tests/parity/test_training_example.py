"""Whole examples of the photographs against the reference's rules, AutoTokenizer and torch.

The conversation is put together here from the interface strings, tokenized by transformers with
the five added tokens, and compared id by id with what training and evaluation get.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.pictures import first_resize, hf_processor
from vrt_jax.config import DataConfig, ImageConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.image import decode_image
from vrt_jax.data.records import EvalRecord, TrainRecord, read_eval_records, read_train_records
from vrt_jax.data.trace import evaluation_user_text
from vrt_jax.data.transforms import Example, make_example, make_prompt

IGNORED = -100
DATA = DataConfig(buckets=((8192, 6400),), num_objects=5)
IMAGE = ImageConfig(
  min_pixels=512 * 784, max_pixels=2048 * 784, inference_factor_px=28, grounding_size_px=1024
)
VERBS = ("respond with", "output the")
THINK = (
  "You should first think about the reasoning process in the mind and then provides the user with"
  " the answer. Please {verb} segmentation mask in both the thinking process and the answer."
)
TEMPLATE = (
  "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer>"
  " tags, respectively, i.e., <think> reasoning process here </think> <answer> answers here"
  " </answer>."
)


@dataclass(frozen=True)
class Rules:
  """How a conversation is written; the defaults are the reference's, anything else a control."""

  system: str = ""
  after_image: str = "\n"
  seg: str = " [SEG]"
  renumber: bool = True
  end_labelled: bool = True
  newline_labelled: bool = False


@pytest.fixture(scope="module")
def train_records(shared_data: Path) -> list[TrainRecord]:
  records = list(read_train_records(str(shared_data / "photos/photos_train.tfrecord")))
  assert len(records) == 7
  return records


@pytest.fixture(scope="module")
def eval_records(shared_data: Path) -> list[EvalRecord]:
  records = list(read_eval_records(str(shared_data / "photos/photos_eval.tfrecord")))
  assert len(records) == 7
  return records


@pytest.fixture(scope="module")
def hf_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
  tokenizer = AutoTokenizer.from_pretrained(shared_data / "qwen3-tokenizer")
  tokenizer.add_tokens(["[SEG]", "<p>", "</p>", "<vp>", "</vp>"], special_tokens=True)
  assert len(tokenizer) == 151674
  return tokenizer


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> ChatTokenizer:
  return ChatTokenizer.from_dir(shared_data / "qwen3-tokenizer")


def visual_tokens(data: bytes, inference: bool) -> int:
  """How many tokens the reference's processor makes of a picture."""
  image = decode_image(data)
  out = hf_processor(IMAGE)(
    images=[first_resize(image) if inference else image], return_tensors="np"
  )
  return len(out["pixel_values"]) // 4


def prompt_text(question: str, num_visual: int, rules: Rules) -> str:
  """The user's turn and the opening of the assistant's."""
  image = "<|vision_start|>" + "<|image_pad|>" * num_visual + "<|vision_end|>"
  user = f"<|im_start|>user\n{image}{rules.after_image}{question}<|im_end|>\n"
  return f"{rules.system}{user}<|im_start|>assistant\n"


def target_text(candidate: dict, thinking: bool, rules: Rules) -> tuple[str, list[str]]:
  """(target, the tag of each [SEG] in the annotation's numbering)."""
  answer = candidate["answer_caption"]
  target = f"<think>{candidate['reasoning']}</think>\n\n<answer>{answer}</answer>"
  if not thinking:
    target = re.sub("</?vea>", "", answer)
  tags = re.findall(r"<obj\d+>", target)
  order = list(dict.fromkeys(tags))
  pieces = re.split(r"(<obj\d+>)", target)
  for i in range(1, len(pieces), 2):
    number = order.index(pieces[i]) + 1 if rules.renumber else int(pieces[i][4:-1])
    pieces[i] = f"<obj{number}>{rules.seg}"
  return "".join(pieces).strip(), tags


def conversation(
  hf_tokenizer: PreTrainedTokenizerBase,
  record: TrainRecord,
  thinking: bool,
  think_prompt: int,
  rules: Rules = Rules(),
) -> tuple[list[int], list[int]]:
  """(input_ids, labels) of a training record."""
  candidate = record.annotation["generated_ver_data"]["candidates"][0]
  question = candidate["question"]
  if thinking:
    question += f"\n\n{THINK.format(verb=VERBS[think_prompt])}\n\n{TEMPLATE}"
  prompt = prompt_text(question, visual_tokens(record.image, inference=False), rules)
  target, _ = target_text(candidate, thinking, rules)
  end, newline = "<|im_end|>", "\n"
  parts = [(prompt, False), (target, True), (end, rules.end_labelled)]
  parts.append((newline, rules.newline_labelled))
  ids, labels = [], []
  for text, labelled in parts:
    new = hf_tokenizer.encode(text, add_special_tokens=False)
    ids += new
    labels += new if labelled else [IGNORED] * len(new)
  return ids, labels


def ours(
  tokenizer: ChatTokenizer, record: TrainRecord, thinking: bool, seed: int = 0
) -> tuple[Example, int]:
  """Our example and the think prompt that its generator draws first."""
  data = DataConfig(buckets=DATA.buckets, num_objects=DATA.num_objects, thinking=thinking)
  example = make_example(record, tokenizer, data, IMAGE, np.random.default_rng(seed))
  return example, int(np.random.default_rng(seed).integers(2))


@pytest.mark.parametrize("thinking", [True, False])
def test_ids_and_labels_of_training_examples(tokenizer, hf_tokenizer, train_records, thinking):
  drawn = set()
  for seed, record in enumerate(train_records):
    example, think_prompt = ours(tokenizer, record, thinking, seed)
    ids, labels = conversation(hf_tokenizer, record, thinking, think_prompt)
    assert example.input_ids.tolist() == ids
    assert example.labels.tolist() == labels
    drawn.add(think_prompt)
  assert drawn == {0, 1}


@pytest.mark.parametrize(
  "wrong",
  [
    Rules(system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    Rules(after_image=""),
    Rules(seg="[SEG]"),
    Rules(renumber=False),
    Rules(end_labelled=False),
    Rules(newline_labelled=True),
  ],
  ids=lambda rules: str(rules)[5:],
)
def test_other_conversations_fail(tokenizer, hf_tokenizer, train_records, wrong):
  record = train_records[0]  # its objects are 1, 4 and 5
  example, think_prompt = ours(tokenizer, record, True)
  got = example.input_ids.tolist(), example.labels.tolist()
  assert got == conversation(hf_tokenizer, record, True, think_prompt)
  assert got != conversation(hf_tokenizer, record, True, think_prompt, wrong)


@pytest.mark.parametrize("thinking", [True, False])
def test_ids_of_evaluation_prompts(tokenizer, hf_tokenizer, eval_records, thinking):
  for record in eval_records:
    request = f"{THINK.format(verb=VERBS[0])}\n\n{TEMPLATE}"
    if not thinking:
      request = "Please respond with segmentation mask."
    count = visual_tokens(record.image, inference=True)
    text = prompt_text(f"{record.question}\n\n{request}", count, Rules())
    expected = hf_tokenizer.encode(text, add_special_tokens=False)
    user_text = evaluation_user_text(record.question, thinking)
    prompt, _ = make_prompt(record.image, user_text, tokenizer, IMAGE, inference=True)
    assert prompt.input_ids.tolist() == expected
    other = evaluation_user_text(record.question, not thinking)
    prompt, _ = make_prompt(record.image, other, tokenizer, IMAGE, inference=True)
    assert prompt.input_ids.tolist() != expected


def torch_mask(segmentation: dict | list, mode: str) -> np.ndarray:
  """The union of the COCO RLEs at 256 x 256, by pycocotools and torch."""
  rles = segmentation if isinstance(segmentation, list) else [segmentation]
  decoded = np.stack([coco.decode(rle) for rle in rles]).max(axis=0)
  return F.interpolate(torch.tensor(decoded)[None, None].float(), (256, 256), mode=mode)[
    0, 0
  ].numpy()


def test_seg_positions_and_masks(tokenizer, hf_tokenizer, train_records):
  """Five mentions a sample: again from the first where there are fewer, five of them else."""
  seg = hf_tokenizer.convert_tokens_to_ids("[SEG]")
  differing = 0
  for record in train_records:
    example, _ = ours(tokenizer, record, True)
    candidate = record.annotation["generated_ver_data"]["candidates"][0]
    _, tags = target_text(candidate, True, Rules())
    positions = np.flatnonzero(example.input_ids == seg)
    assert 1 < len(positions) == len(tags)
    chosen = [positions.tolist().index(p) for p in example.seg_positions]
    if len(tags) <= 5:
      assert chosen == [i % len(tags) for i in range(5)]
    else:
      assert len(chosen) == 5 and chosen == sorted(set(chosen))
    objects = record.annotation["original_annotation"]["objects_anns"]
    for mask, i in zip(example.masks, chosen, strict=True):
      segmentation = objects[tags[i]]["segmentation"]
      np.testing.assert_array_equal(mask, torch_mask(segmentation, "nearest"))
      differing += (mask != torch_mask(segmentation, "nearest-exact")).sum()
  assert differing > 1000
