"""The tokenizer and the chat template, to the letter.

    <|im_start|>user\\n<|vision_start|><|image_pad|>*n<|vision_end|>\\n{question ..}<|im_end|>\\n
    <|im_start|>assistant\\n{target}<|im_end|>\\n

No system turn; loss on the target and its <|im_end|>. Source: Sa2VA's qwen_chat template
(xtuner), Sa2VABaseDataset and tokenize_conversation.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from vrt_jax.data.trace import IMAGE_PLACEHOLDER, SEG
from vrt_jax.types import IGNORE_INDEX

IM_START, IM_END, ENDOFTEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_PAD, IMAGE_PAD, VIDEO_PAD = "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"

VRT_TOKENS = (SEG, "<p>", "</p>", "<vp>", "</vp>")
"""Added after Qwen's own tokens, in this order."""
QWEN_SPECIAL_TOKENS = (
  ENDOFTEXT,
  IM_START,
  IM_END,
  VISION_START,
  VISION_END,
  VISION_PAD,
  IMAGE_PAD,
  VIDEO_PAD,
)
THINK_TOKENS = ("<think>", "</think>")
"""Single tokens, but not special ones: decoding never hides them."""
REQUIRED_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, ENDOFTEXT, SEG)

_CONTROL_TOKEN = re.compile("|".join(re.escape(token) for token in QWEN_SPECIAL_TOKENS))
_PRE_TOKENIZER = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKENIZER_CONFIG = {
  "add_bos_token": False,
  "add_prefix_space": False,
  "bos_token": None,
  "clean_up_tokenization_spaces": False,
  "eos_token": IM_END,
  "errors": "replace",
  "pad_token": ENDOFTEXT,
  "split_special_tokens": False,
  "tokenizer_class": "Qwen2Tokenizer",
  "unk_token": None,
}


class ChatTokenizer:
  """Qwen's tokenizer with the five tokens of Sa2VA; ids 151669 .. 151673 on the real one."""

  def __init__(self, tokenizer: Tokenizer, config: dict | None = None):
    """Adds missing Sa2VA tokens to `tokenizer`; `config` is what tokenizer_config.json holds.

    Raises ValueError where a token that the template needs is missing or not a single token.
    """
    self._tokenizer = tokenizer
    self._config = dict(_TOKENIZER_CONFIG if config is None else config)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    missing = [token for token in VRT_TOKENS if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([_added(token, special=True) for token in missing])
    for token in REQUIRED_TOKENS:
      token_id = tokenizer.token_to_id(token)
      if token_id is None:
        raise ValueError(f"the tokenizer has no token {token}")
      if self.encode(token) != [token_id]:
        raise ValueError(f"the tokenizer splits {token} into {len(self.encode(token))} tokens")

  @classmethod
  def from_dir(cls, path: str | Path) -> "ChatTokenizer":
    """Reads tokenizer.json and tokenizer_config.json (optional) of a Hugging Face folder.

    Raises ValueError for a missing or unreadable file and for missing tokens.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
      raise ValueError(f"{file}: no such file (a tokenizer folder needs tokenizer.json)")
    content = _read_json(file)
    if not isinstance(content.get("model"), dict):
      raise ValueError(f"{file}: not a tokenizer: no model in it")
    config_file = file.with_name("tokenizer_config.json")
    config = _read_json(config_file) if config_file.is_file() else None
    return cls(Tokenizer.from_file(str(file)), config)

  def save(self, path: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for `from_dir` and HF's AutoTokenizer."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    self._tokenizer.save(str(path / "tokenizer.json"))
    added = self._tokenizer.get_added_tokens_decoder()
    config = self._config | {
      "added_tokens_decoder": {
        str(token_id): {
          "content": token.content,
          "lstrip": token.lstrip,
          "normalized": token.normalized,
          "rstrip": token.rstrip,
          "single_word": token.single_word,
          "special": token.special,
        }
        for token_id, token in sorted(added.items())
      }
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

  def encode(self, text: str) -> list[int]:
    """Token ids; special tokens in the text become their ids, nothing is added.

    Raises ValueError for text with lone surrogates (undecodable bytes of a command line).
    """
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(f"the text is not valid Unicode: {error}") from error
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int], keep_special: bool = True) -> str:
    """The text of `ids`; ids outside the vocabulary are left out."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not keep_special)

  def token_id(self, token: str) -> int:
    """Id of one token. Raises ValueError where the vocabulary lacks it."""
    token_id = self._tokenizer.token_to_id(token)
    if token_id is None:
      raise ValueError(f"the tokenizer has no token {token}")
    return token_id

  @property
  def vocab_size(self) -> int:
    """Entries, added tokens included: the rows of the embedding."""
    return self._tokenizer.get_vocab_size(with_added_tokens=True)

  @property
  def seg_id(self) -> int:
    return self.token_id(SEG)

  @property
  def image_pad_id(self) -> int:
    return self.token_id(IMAGE_PAD)

  @property
  def video_pad_id(self) -> int:
    return self.token_id(VIDEO_PAD)

  @property
  def vision_start_id(self) -> int:
    return self.token_id(VISION_START)

  @property
  def vision_end_id(self) -> int:
    return self.token_id(VISION_END)

  @property
  def im_end_id(self) -> int:
    """The one token that ends generation."""
    return self.token_id(IM_END)

  @property
  def endoftext_id(self) -> int:
    """Padding of generation; it does not stop it."""
    return self.token_id(ENDOFTEXT)

  @property
  def never_sample_ids(self) -> tuple[int, ...]:
    """Vision and padding tokens: a rollout with one could not be fed back to the model."""
    tokens = (ENDOFTEXT, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD)
    ids = (self._tokenizer.token_to_id(token) for token in tokens)
    return tuple(token_id for token_id in ids if token_id is not None)


def _read_json(file: Path) -> dict:
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{file}: not a JSON file: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{file}: not a JSON object")
  return content


def _added(token: str, special: bool) -> AddedToken:
  return AddedToken(token, special=special, normalized=False)


def _refuse_control_tokens(text: str, what: str) -> None:
  match = _CONTROL_TOKEN.search(text)
  if match:
    raise ValueError(f"control token: the {what} text holds {match.group()} at {match.start()}")


def prompt_text(user_text: str, num_visual_tokens: list[int]) -> str:
  """The user's turn and the opening of the assistant's, pictures as runs of <|image_pad|>.

  Each "<image>" of `user_text` becomes one vision block, in order; the outcome is stripped of
  outer whitespace as in the reference's loader.

      "<image>\\nHi", [2] -> "<|im_start|>user\\n<|vision_start|><|image_pad|><|image_pad|>
      <|vision_end|>\\nHi<|im_end|>\\n<|im_start|>assistant\\n"

  Raises ValueError where the numbers of placeholders and of pictures differ, a picture has no
  tokens, or the text holds a control token of the template.
  """
  _refuse_control_tokens(user_text, "user")
  parts = user_text.split(IMAGE_PLACEHOLDER)
  if len(parts) - 1 != len(num_visual_tokens):
    raise ValueError(
      f"images: the user text has {len(parts) - 1} {IMAGE_PLACEHOLDER} placeholders"
      f" for {len(num_visual_tokens)} images"
    )
  if any(count < 1 for count in num_visual_tokens):
    raise ValueError(f"images: visual tokens must be positive, not {list(num_visual_tokens)}")
  body = parts[0]
  for count, part in zip(num_visual_tokens, parts[1:], strict=True):
    body += VISION_START + IMAGE_PAD * count + VISION_END + part
  return f"{IM_START}user\n{body.strip()}{IM_END}\n{IM_START}assistant\n"


def encode_prompt(
  tokenizer: ChatTokenizer, user_text: str, num_visual_tokens: list[int]
) -> list[int]:
  """Token ids of `prompt_text`; the same errors."""
  return tokenizer.encode(prompt_text(user_text, num_visual_tokens))


def encode_training(
  tokenizer: ChatTokenizer,
  user_text: str,
  target_text: str,
  num_visual_tokens: list[int],
  max_length: int,
) -> tuple[list[int], list[int]]:
  """(input_ids, labels) of a conversation, unpadded.

  Prompt and closing "\\n" carry IGNORE_INDEX, the stripped target and its <|im_end|> their own
  ids (labels are not shifted). The three parts are tokenized separately, as the reference does.

  Raises ValueError("too long: ...") above `max_length` tokens, where the reference would cut off
  the end of the answer, and those of `prompt_text`.
  """
  prompt = encode_prompt(tokenizer, user_text, num_visual_tokens)
  _refuse_control_tokens(target_text, "target")
  target = tokenizer.encode(target_text.strip() + IM_END)
  tail = tokenizer.encode("\n")
  input_ids = prompt + target + tail
  if len(input_ids) > max_length:
    raise ValueError(f"too long: {len(input_ids)} tokens, the limit is {max_length}")
  labels = [IGNORE_INDEX] * len(prompt) + target + [IGNORE_INDEX] * len(tail)
  return input_ids, labels


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """A byte-level BPE with Qwen's normaliser and word pattern and Qwen's control tokens at the end.

  `vocab_size` counts the control tokens, but not the five that `ChatTokenizer` adds; a small
  corpus gives fewer entries. The same texts give the same tokenizer.

  Raises ValueError where `vocab_size` has no room for the 256 bytes and the control tokens.
  """
  num_added = len(QWEN_SPECIAL_TOKENS) + len(THINK_TOKENS)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  smallest = len(alphabet) + num_added
  if vocab_size < smallest:
    raise ValueError(f"vocab_size must be at least {smallest}, not {vocab_size}")
  tokenizer = Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PRE_TOKENIZER), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = BpeTrainer(
    vocab_size=vocab_size - num_added, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_special_tokens([_added(token, special=True) for token in QWEN_SPECIAL_TOKENS])
  tokenizer.add_tokens([_added(token, special=False) for token in THINK_TOKENS])
  return tokenizer
