"""The question file of own data: one entry a sample, in a JSON list or in lines of JSON.

    {"image": "kitchen/1.jpg", "question": "What can hold water?",
     "reasoning": "On the table stands a cup (<ver><obj1></ver>).",
     "answer": "The cup (<vea><obj1></vea>).",
     "objects": {"<obj1>": 17}}

Optional: `reasoning`, `key`, `captions` {tag: text}, and for evaluation `class_ids` (["#loc"]) and
`confidence`. What an object is depends on the annotations, see their modules; a list of them is
their union.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool

from scripts.annotations.regions import Size, require_size
from vrt_jax.data.checks import check_eval_record, check_train_record, picture_size
from vrt_jax.data.records import EvalRecord, TrainRecord
from vrt_jax.ops.masks import Rle, encode_rle

TAG = re.compile(r"<obj(\d+)>")


class Annotations(Protocol):
  """Where the masks come from."""

  def find(self, image: str, size: Size, reference: object) -> tuple[Bool[np.ndarray, "Y X"], str]:
    """(mask, caption) of what a question file calls an object; ValueError where there is none."""
    ...


@dataclass(frozen=True)
class Question:
  """An entry of the question file, its fields of the right types."""

  image: str
  question: str
  answer: str
  objects: dict[str, Any]
  reasoning: str | None = None
  key: str = ""
  captions: dict[str, str] = dataclasses.field(default_factory=dict)
  class_ids: list[str] = dataclasses.field(default_factory=list)
  confidence: int = 5


_TYPES = {
  "image": str,
  "question": str,
  "answer": str,
  "objects": dict,
  "reasoning": str,
  "key": str,
  "captions": dict,
  "class_ids": list,
  "confidence": int,
}
_REQUIRED = ("image", "question", "answer", "objects")


def read_entries(path: Path) -> list[tuple[str, object]]:
  """(place in the file, entry) of a JSON list or of lines of JSON.

  Raises ValueError where the file is neither, or is empty.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError:
    raise ValueError(f"{path} is not UTF-8") from None
  if text.lstrip().startswith("["):
    try:
      entries = [(f"entry {i}", entry) for i, entry in enumerate(json.loads(text), 1)]
    except json.JSONDecodeError as error:
      raise ValueError(f"{path} is not JSON: {error}") from None
  else:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
      if line.strip():
        try:
          entries.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
          entries.append((f"line {number}", ValueError(f"is not JSON: {error}")))
  if not entries:
    raise ValueError(f"{path} holds no entry")
  return entries


def parse_entry(entry: object) -> tuple[Question | None, list[str]]:
  """(question, problems): the question is None where there are problems."""
  if isinstance(entry, ValueError):
    return None, [str(entry)]
  if not isinstance(entry, dict):
    return None, ["is not an object"]
  problems = [f"has no {name}" for name in _REQUIRED if name not in entry]
  for name, value in entry.items():
    if name not in _TYPES:
      problems.append(f"unknown field {name}, the fields are {', '.join(_TYPES)}")
    elif not isinstance(value, _TYPES[name]) or isinstance(value, bool):
      problems.append(f"{name} is not a {_TYPES[name].__name__}")
  if problems:
    return None, problems
  question = Question(**entry)
  for name in ("objects", "captions"):
    for tag in entry.get(name, {}):
      if not TAG.fullmatch(tag):
        problems.append(f"{name}: {tag!r} is not of the form <obj1>")
  texts = [*question.captions.values(), *question.class_ids]
  if not all(isinstance(text, str) for text in texts):
    problems.append("captions and class_ids hold texts")
  mentioned = dict.fromkeys(m.group() for m in TAG.finditer(question.answer))
  if not mentioned:
    problems.append("the answer mentions no object")
  mentioned |= dict.fromkeys(m.group() for m in TAG.finditer(question.reasoning or ""))
  problems += [f"{tag} is not in objects" for tag in mentioned if tag not in question.objects]
  return (None if problems else question), problems


def find_objects(
  question: Question, size: Size, annotations: Annotations
) -> tuple[dict[str, tuple[Rle, str]], list[str]]:
  """({tag: (mask, caption)}, problems) of all objects of a question."""
  found, problems = {}, []
  for tag, value in question.objects.items():
    references = value if isinstance(value, list) else [value]
    try:
      if not references:
        raise ValueError("an empty list")
      parts = [annotations.find(question.image, size, reference) for reference in references]
      for mask, _ in parts:
        require_size("the mask", mask.shape, size)
      mask = np.logical_or.reduce([mask for mask, _ in parts])
      if not mask.any():
        raise ValueError("the mask is empty")
    except ValueError as error:
      problems.append(f"{tag}: {error}")
      continue
    found[tag] = encode_rle(mask), question.captions.get(tag, parts[0][1])
  return found, problems


def read_picture(path: Path) -> tuple[bytes, Size]:
  """(bytes, size) of a picture that decodes to the last row; ValueError where it does not."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(f"image {path}: {error.strerror}") from None
  try:
    return data, picture_size(data, "full")
  except ValueError as error:
    raise ValueError(f"image {path}: {error}") from None


def train_record(
  key: str, image: bytes, question: Question, objects: dict[str, tuple[Rle, str]]
) -> TrainRecord:
  """A sample of the VRT-80k layout; raises ValueError where it could not be trained on."""
  candidate: dict[str, Any] = {"question": question.question, "answer_caption": question.answer}
  if question.reasoning is not None:
    candidate["reasoning"] = question.reasoning
  candidate["answer_objects"] = list(dict.fromkeys(_tags(question.answer)))
  annotation = {
    "image_name": question.image,
    "original_annotation": {
      "objects_anns": {
        tag: {"caption": caption, "segmentation": mask} for tag, (mask, caption) in objects.items()
      }
    },
    "generated_ver_data": {"candidates": [candidate]},
  }
  record = TrainRecord(key, image, annotation)
  check_train_record(record, thinking=question.reasoning is not None)
  return record


def eval_record(
  key: str, image: bytes, question: Question, objects: dict[str, tuple[Rle, str]]
) -> EvalRecord:
  """A sample of the VRT-Eval layout; raises ValueError where it could not be evaluated.

  Object ids are the numbers of the tags.
  """
  record = EvalRecord(
    key=key,
    image=image,
    question=question.question,
    objects={
      _number(tag): {"mask": mask, "caption": caption, "original_id": tag}
      for tag, (mask, caption) in objects.items()
    },
    reasoning_ids=_distinct_numbers(question.reasoning or ""),
    answer_ids=_distinct_numbers(question.answer),
    class_ids=question.class_ids,
    confidence=question.confidence,
    reference_reasoning=question.reasoning,
    reference_answer=question.answer,
  )
  check_eval_record(record)
  return record


def _tags(text: str) -> list[str]:
  return [match.group() for match in TAG.finditer(text)]


def _number(tag: str) -> str:
  return str(int(tag[len("<obj") : -1]))


def _distinct_numbers(text: str) -> list[str]:
  return list(dict.fromkeys(_number(tag) for tag in _tags(text)))


def make_keys(questions: Sequence[Question]) -> tuple[list[str], list[str]]:
  """(keys, problems): given keys, else the picture's name and a number; problems name doubles."""
  taken = {question.key for question in questions if question.key}
  keys, used, problems = [], set(), []
  counts: dict[str, int] = {}
  for question in questions:
    key = question.key
    while not key:
      stem = Path(question.image).with_suffix("").as_posix()
      key = f"{stem}_{counts.setdefault(stem, 0)}"
      counts[stem] += 1
      key = "" if key in taken else key
    if key in used:
      problems.append(f"key {key!r} is given twice")
    used.add(key)
    keys.append(key)
  return keys, problems
