"""The reasoning trace: prompts, tags, the role of every [SEG] and the words it belongs to.

    <think>.. a boy (<ver><obj1> [SEG]</ver>) ..</think>

    <answer>The cap (<vea><obj2> [SEG]</vea>) ..</answer>

Evidence stands in <ver>, answers in <vea>; <objN> numbers objects in order of first mention.
Strings and rules follow R-Sa2VA (arXiv 2512.05091): Sa2VAVRTTrain, prepare_question_prompt and
find_seg_indices of projects/vrt_sa2va.
"""

import re
from dataclasses import dataclass
from typing import Literal

SEG = "[SEG]"
IMAGE_PLACEHOLDER = "<image>"

THINK_PROMPTS = (
  "You should first think about the reasoning process in the mind and then provides the user with"
  " the answer. Please respond with segmentation mask in both the thinking process and the answer.",
  "You should first think about the reasoning process in the mind and then provides the user with"
  " the answer. Please output the segmentation mask in both the thinking process and the answer.",
)
THINK_TEMPLATE = (
  "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer>"
  " tags, respectively, i.e., <think> reasoning process here </think> <answer> answers here"
  " </answer>."
)
NO_THINKING_PROMPT = "Please respond with segmentation mask."

Role = Literal["reasoning", "answer", "none"]

_OBJECT_TAG = re.compile(r"<obj\d+>")
_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"


def answer_spans(text: str) -> list[tuple[int, int]]:
  """Spans <answer>..</answer>, each from an opening tag to the nearest closing tag."""
  spans = []
  end = 0
  while (start := text.find(_ANSWER_OPEN, end)) >= 0:
    close = text.find(_ANSWER_CLOSE, start + len(_ANSWER_OPEN))
    if close < 0:
      break
    end = close + len(_ANSWER_CLOSE)
    spans.append((start, end))
  return spans


def seg_roles(
  text: str, multiple_answers: Literal["first", "none"] = "first"
) -> tuple[list[int], list[int]]:
  """Indices of the [SEG]s of `text` that are reasoning and answer.

  A [SEG] before the <answer> span is reasoning, inside it answer, after it neither; without a
  closed span there are no roles. With several spans "first" takes the first one (the reference's
  evaluation) and "none" gives no roles (its training).

      "a [SEG] <answer>b [SEG]</answer> c [SEG]" -> ([0], [1])

  Raises ValueError for another value of `multiple_answers`.
  """
  if multiple_answers not in ("first", "none"):
    raise ValueError(f'multiple_answers must be "first" or "none", not {multiple_answers!r}')
  spans = answer_spans(text)
  if not spans or (len(spans) > 1 and multiple_answers == "none"):
    return [], []
  start, end = spans[0]
  positions = [match.start() for match in re.finditer(re.escape(SEG), text)]
  reasoning = [i for i, position in enumerate(positions) if position < start]
  answer = [i for i, position in enumerate(positions) if start <= position < end]
  return reasoning, answer


def _thinking_user_text(question: str, think_prompt: int) -> str:
  if not 0 <= think_prompt < len(THINK_PROMPTS):
    raise ValueError(f"think_prompt must be 0 .. {len(THINK_PROMPTS) - 1}, not {think_prompt}")
  prompt = f"{question}\n\n{THINK_PROMPTS[think_prompt]}\n\n{THINK_TEMPLATE}"
  return f"{IMAGE_PLACEHOLDER}\n{prompt}"


def evaluation_user_text(question: str, thinking: bool = True) -> str:
  """The user's turn at evaluation, "<image>\\n" first."""
  if thinking:
    return _thinking_user_text(question, 0)
  return f"{IMAGE_PLACEHOLDER}\n{question}\n\n{NO_THINKING_PROMPT}"


def _first_candidate(annotation: dict) -> dict:
  generated = annotation.get("generated_ver_data")
  candidates = generated.get("candidates") if isinstance(generated, dict) else None
  if not isinstance(candidates, list) or not candidates or not isinstance(candidates[0], dict):
    raise ValueError("no candidates: generated_ver_data.candidates is missing or empty")
  return candidates[0]


def _candidate_text(candidate: dict, field: str) -> str:
  value = candidate.get(field)
  if not isinstance(value, str):
    raise ValueError(f"missing text: {field} of the first candidate is {value!r}, not a string")
  return value


def object_annotations(annotation: dict) -> dict:
  """original_annotation.objects_anns of a VRT-80k annotation: {"<objN>": {"segmentation": ..}}.

  Raises ValueError("no objects: ...") where it is missing.
  """
  original = annotation.get("original_annotation")
  objects = original.get("objects_anns") if isinstance(original, dict) else None
  if not isinstance(objects, dict):
    raise ValueError("no objects: original_annotation.objects_anns is missing")
  return objects


def ground_truth_tags(annotation: dict) -> tuple[list[str], list[str]]:
  """(answer tags, evidence tags) of a VRT-80k annotation, each tag once, in order.

  Answer tags are the candidate's `answer_objects`, evidence tags those that its reasoning mentions.
  All are in objects_anns.

  Raises ValueError ("no answer objects: ..", "unknown tag: ..", and those of `training_example`).
  """
  candidate = _first_candidate(annotation)
  answers = candidate.get("answer_objects")
  if not isinstance(answers, list) or not answers:
    raise ValueError(f"no answer objects: answer_objects of the first candidate is {answers!r}")
  evidence = _OBJECT_TAG.findall(_candidate_text(candidate, "reasoning"))
  objects = object_annotations(annotation)
  for tag in [*answers, *evidence]:
    if not isinstance(tag, str) or tag not in objects:
      raise ValueError(f"unknown tag: {tag} is not in objects_anns")
  return list(dict.fromkeys(answers)), list(dict.fromkeys(evidence))


def training_question(annotation: dict) -> str:
  """The question of a VRT-80k annotation; raises ValueError as `training_example` does."""
  return _candidate_text(_first_candidate(annotation), "question")


def training_example(
  annotation: dict, thinking: bool = True, think_prompt: int = 0
) -> tuple[str, str, list[str]]:
  """(user_text, target_text, mask_tags) of a VRT-80k annotation.

  user_text starts with "<image>\\n". In target_text objects are renumbered <obj1>, .. by first
  mention over the whole target and each mention is followed by [SEG]; mask_tags holds the
  original tag of every [SEG], in text order. Without thinking the question stays bare and the
  target is the answer caption without <vea>.

      answer "A cap (<vea><obj7></vea>)." -> ".. <answer>A cap (<vea><obj1> [SEG]</vea>).</answer>",
      mask_tags ["<obj7>"]

  Raises ValueError whose words before the colon are the reason to count: "no candidates",
  "missing text", "no objects", "seg in text", "no mask mention", "unknown tag".
  """
  candidate = _first_candidate(annotation)
  question = _candidate_text(candidate, "question")
  answer = _candidate_text(candidate, "answer_caption")
  if thinking:
    reasoning = _candidate_text(candidate, "reasoning")
    user_text = _thinking_user_text(question, think_prompt)
    target = f"<think>{reasoning}</think>\n\n{_ANSWER_OPEN}{answer}{_ANSWER_CLOSE}"
  else:
    user_text = f"{IMAGE_PLACEHOLDER}\n{question}"
    target = answer.replace("<vea>", "").replace("</vea>", "")

  if SEG in target:
    raise ValueError(f"seg in text: the annotation already has {SEG} at {target.index(SEG)}")
  mask_tags = _OBJECT_TAG.findall(target)
  if not mask_tags:
    raise ValueError("no mask mention: the target names no <objN>")
  objects = object_annotations(annotation)
  for tag in mask_tags:
    if tag not in objects:
      raise ValueError(f"unknown tag: {tag} is not in objects_anns")
  numbers = {tag: i for i, tag in enumerate(dict.fromkeys(mask_tags), start=1)}
  target = _OBJECT_TAG.sub(lambda match: f"<obj{numbers[match.group()]}> {SEG}", target)
  return user_text, target, mask_tags


@dataclass(frozen=True)
class Mention:
  """One [SEG] of a text, with the words it belongs to."""

  index: int
  """Number of the [SEG] in the text, from 0."""
  role: Role
  phrase: str
  """The noun phrase before the markup, "" where there is none."""
  text_span: tuple[int, int]
  """[start, end) characters of the phrase and its markup."""
  object_number: int | None
  """N of the <objN> in front of the [SEG]."""


MAX_PHRASE_WORDS = 6
_MAX_LOOK_BACK = 200
_MAX_DIGITS = 9
_MARKUP = re.compile(
  r"(?:\(\s*+)?(?:<(?:ver|vea)>\s*+)?(?:<obj(\d++)>\s*+)?\[SEG\](?:</(?:ver|vea)>)?(?:\))?"
)
_JOINER = re.compile(r"(?:[\s,;/&(]|and|or|<(?:ver|vea)>|</(?:ver|vea)>)*")
_BREAK = re.compile(r"[.,;:!?()\[\]\"\n\u2014]|<[^<>]*>")
_WORD = re.compile(r"\S+")
_ARTICLES = frozenset(
  "a an the this that these those his her its their my your our another each every both two three"
  " four five six".split()
)
_PLACE_LINKS = frozenset("on in at from".split())
_PLACES = frozenset("left right middle center centre top bottom front back side".split())
_STOPS = frozenset(
  "of on in at to by with from near for and or but as into onto over under behind beside between"
  " above below is are was were be has have had holds holding shows showing sees see wears wearing"
  " there here which who while where because so it next than".split()
)


def _links(word: str, tail: list[str]) -> bool:
  """Whether `word` joins the words after it (`tail`, last first) to a noun before it."""
  if not tail:
    return False
  return word == "of" or (word in _PLACE_LINKS and _PLACES.issuperset(set(tail) - _ARTICLES))


def _noun_phrase_start(text: str, start: int, end: int) -> int:
  """Where the noun phrase that ends at `end` begins: `start` at the earliest, `end` for none.

  Walks back word by word, to an article or until a preposition, conjunction or verb, but on
  through "the back of the car" and "the boy on the left".
  """
  words = [(match.start(), match.group().lower()) for match in _WORD.finditer(text, start, end)]
  begin = end
  tail: list[str] = []
  for i in reversed(range(max(0, len(words) - MAX_PHRASE_WORDS), len(words))):
    position, word = words[i]
    if word not in _STOPS:
      begin = position
    elif not _links(word, tail):
      break
    if word in _ARTICLES and not (i and _links(words[i - 1][1], tail)):
      break
    tail.append(word)
  return begin


def _phrase(text: str, start: int, end: int) -> tuple[int, str]:
  """(start of the phrase with its tags, phrase) for markup that begins at `end`."""
  start = max(start, end - _MAX_LOOK_BACK)
  stop = start + len(text[start:end].rstrip())
  if text.endswith("</p>", start, stop):
    opening = text.rfind("<p>", start, stop)
    if opening >= 0:
      return opening, text[opening + len("<p>") : stop - len("</p>")].strip()
  for match in _BREAK.finditer(text, start, stop):
    start = match.end()
  begin = _noun_phrase_start(text, start, stop)
  return (begin, text[begin:stop]) if begin < stop else (end, "")


def mentions(text: str) -> list[Mention]:
  """One Mention for each [SEG] of `text`, in order, however broken the text is.

  Markup that follows another's with only "and" or punctuation between shares its phrase.

      "A cap (<vea><obj2> [SEG]</vea>)" -> [Mention(0, "none", "A cap", (0, 31), 2)]
  """
  reasoning, answer = (set(indices) for indices in seg_roles(text))
  found: list[Mention] = []
  end = 0
  for i, match in enumerate(_MARKUP.finditer(text)):
    start = match.start()
    if found and _JOINER.fullmatch(text, end, start):
      phrase = found[-1].phrase
    else:
      start, phrase = _phrase(text, end, start)
    end = match.end()
    digits = match.group(1)
    number = int(digits) if digits and len(digits) <= _MAX_DIGITS else None
    role: Role = "reasoning" if i in reasoning else "answer" if i in answer else "none"
    found.append(Mention(i, role, phrase, (start, end), number))
  return found
