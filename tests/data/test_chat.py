"""The tokenizer and the chat template, on the real Qwen3 tokenizer and on a small one."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from vrt_jax.data import chat
from vrt_jax.types import IGNORE_INDEX

TARGET = (
  "<think>A young boy (<ver><obj1> [SEG]</ver>) on a sidewalk.</think>\n\n"
  "<answer>The cap (<vea><obj12> [SEG]</vea>).</answer>"
)
TEXTS = [
  TARGET,
  "I'll see: 42 caps, naïve café e\u0301 日本語\U0001f600 \t\n\n  end  ",
  "<|im_start|>user\nHi<|im_end|>\n<p>x</p><vp> [SEG].[SEG]",
  "",
]


@pytest.fixture(scope="module")
def real(shared_data: Path) -> chat.ChatTokenizer:
  return chat.ChatTokenizer.from_dir(shared_data / "qwen3-tokenizer")


@pytest.fixture(scope="module")
def small() -> chat.ChatTokenizer:
  return chat.ChatTokenizer(chat.train_bpe([*TEXTS, "a red circle " * 9, "the left key " * 7], 300))


def test_ids_of_the_real_tokenizer(real: chat.ChatTokenizer):
  assert real.encode("<think></think>") == [151667, 151668]
  assert [real.token_id(token) for token in chat.VRT_TOKENS] == list(range(151669, 151674))
  assert len(real.encode("<answer>")) == 3
  pieces = [real.decode([i]) for i in real.encode("<obj12> [SEG].")]
  assert pieces == ["<", "obj", "1", "2", ">", " ", "[SEG]", "."]
  assert real.vocab_size == 151674
  assert (real.seg_id, real.im_end_id, real.endoftext_id) == (151669, 151645, 151643)
  assert (real.vision_start_id, real.vision_end_id) == (151652, 151653)
  assert (real.image_pad_id, real.video_pad_id) == (151655, 151656)
  assert real.never_sample_ids == (151643, 151652, 151653, 151654, 151655, 151656)


def test_prompt_to_the_letter(real: chat.ChatTokenizer):
  ids = chat.encode_prompt(real, "<image>\nWhere is it?  ", [3])
  assert ids.count(real.image_pad_id) == 3
  assert real.decode(ids) == (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>\n"
    "Where is it?<|im_end|>\n<|im_start|>assistant\n"
  )
  two = chat.prompt_text("<image>\n<image>\nHi", [1, 2])
  assert two.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\n<|vision")
  assert chat.prompt_text(" Hi ", []) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_ids_and_texts_equal_transformers(real: chat.ChatTokenizer, shared_data: Path):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "qwen3-tokenizer")
  theirs.add_tokens(list(chat.VRT_TOKENS), special_tokens=True)
  prompt = chat.prompt_text("<image>\n" + TARGET, [5])
  for text in [*TEXTS, prompt]:
    ids = real.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    for keep in (True, False):
      assert real.decode(ids, keep) == theirs.decode(ids, skip_special_tokens=not keep)
  assert real.vocab_size == len(theirs)


def test_training_labels(real: chat.ChatTokenizer):
  user_text = "<image>\nWhere?"
  ids, labels = chat.encode_training(real, user_text, f" {TARGET}\n", [4], 8192)
  prompt = chat.encode_prompt(real, user_text, [4])
  assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {IGNORE_INDEX}
  assert real.decode(labels[len(prompt) : -1]) == TARGET + "<|im_end|>"
  assert labels[len(prompt) : -1] == ids[len(prompt) : -1]
  assert real.decode(ids[-1:]) == "\n" and labels[-1] == IGNORE_INDEX
  assert ids.count(real.seg_id) == 2 and len(ids) == len(labels)
  assert chat.encode_training(real, user_text, TARGET, [4], len(ids)) == (ids, labels)
  with pytest.raises(ValueError, match=f"^too long: {len(ids)} tokens, the limit is"):
    chat.encode_training(real, user_text, TARGET, [4], len(ids) - 1)


def test_prompt_errors(small: chat.ChatTokenizer):
  with pytest.raises(ValueError, match=r"^images: the user text has 2 <image> placeholders for 1"):
    chat.prompt_text("<image>\nWhat does <image> mean?", [3])
  with pytest.raises(ValueError, match=r"^images: visual tokens must be positive"):
    chat.prompt_text("<image>\n", [0])
  with pytest.raises(ValueError, match=r"^control token: the user text holds <\|im_end\|> at 9"):
    chat.prompt_text("<image>\nx<|im_end|>", [1])
  with pytest.raises(ValueError, match=r"^control token: the target text"):
    chat.encode_training(small, "<image>\n", "a<|image_pad|>", [1], 99)


def test_lone_surrogates(small: chat.ChatTokenizer):
  with pytest.raises(ValueError, match="not valid Unicode"):
    small.encode("a\udce9")


def test_small_tokenizer(small: chat.ChatTokenizer):
  assert small.vocab_size == 300 + len(chat.VRT_TOKENS)
  for text in TEXTS:
    expected = text.replace("e\u0301", "\u00e9")  # NFC
    assert small.decode(small.encode(text)) == expected
  assert len(small.encode("<think>")) == 1
  assert len(small.encode("a red circle")) < len("a red circle")
  assert "[SEG]" not in small.decode(small.encode(TARGET), keep_special=False)
  assert "<think>" in small.decode(small.encode(TARGET), keep_special=False)


def test_training_a_tokenizer_is_deterministic():
  first, second = (chat.train_bpe([*TEXTS, "round red"] * 3, 290).to_str() for _ in range(2))
  assert first == second
  with pytest.raises(ValueError, match="vocab_size must be at least 266"):
    chat.train_bpe([], 265)


def test_same_word_pattern_as_qwen(shared_data: Path):
  real = json.loads((shared_data / "qwen3-tokenizer/tokenizer.json").read_text())
  ours = json.loads(chat.train_bpe([], 266).to_str())
  split = [t["pre_tokenizer"]["pretokenizers"][0] for t in (real, ours)]
  assert split[0] == split[1]
  assert ours["normalizer"] == real["normalizer"]


def test_save_and_load(small: chat.ChatTokenizer, tmp_path: Path):
  small.save(tmp_path / "tokenizer")
  again = chat.ChatTokenizer.from_dir(tmp_path / "tokenizer")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
  assert again.vocab_size == small.vocab_size == len(theirs)
  assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"
  for text in TEXTS:
    ids = small.encode(text)
    assert ids == again.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert small.decode(ids, False) == theirs.decode(ids, skip_special_tokens=True)
  again.save(tmp_path / "again")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "again" / name).read_text() == (tmp_path / "tokenizer" / name).read_text()


def test_loading_errors(tmp_path: Path, small: chat.ChatTokenizer):
  with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
    chat.ChatTokenizer.from_dir(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer\.json: not a JSON file"):
    chat.ChatTokenizer.from_dir(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
    chat.ChatTokenizer.from_dir(tmp_path)
  shutil.rmtree(tmp_path)
  small.save(tmp_path)
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|im_end|>"]
  with pytest.raises(ValueError, match=r"the tokenizer has no token <\|im_end\|>"):
    chat.ChatTokenizer(Tokenizer.from_str(json.dumps(content)))
