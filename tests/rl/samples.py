"""Samples for the tests of rewards: strips of a picture as objects."""

import numpy as np

from vrt_jax.data.trace import seg_roles
from vrt_jax.rl.rewards import Sample

SIZE = 256
GOOD_TEXT = (
  "<think>a (<ver><obj1> [SEG]</ver>) and b (<ver><obj2> [SEG]</ver>)</think>\n\n"
  "<answer>b (<vea><obj2> [SEG]</vea>).</answer><|im_end|>"
)
FIRST, SECOND = (20, 80), (150, 180)
"""Columns of the two objects; the second is the answer."""


def strips(*spans: tuple[int, int], size: int = SIZE) -> np.ndarray:
  """Masks of whole columns [start, stop)."""
  masks = np.zeros((len(spans), size, size), np.uint8)
  for mask, (start, stop) in zip(masks, spans, strict=True):
    mask[:, start:stop] = 1
  return masks


def logits(*spans: tuple[int, int]) -> np.ndarray:
  """Logits of those masks."""
  return strips(*spans).astype(np.float32) * 8 - 4


def sample(text: str, *spans: tuple[int, int], **fields: object) -> Sample:
  """A sample of the two objects that says `text` and segments `spans`."""
  reasoning, answer = seg_roles(text, "none")
  values = {
    "text": text,
    "truncated": False,
    "mask_logits": logits(*spans),
    "seg_slots": range(5, 5 + 10 * len(spans), 10),
    "reasoning_indices": reasoning,
    "answer_indices": answer,
    "answer_masks": strips(SECOND),
    "evidence_masks": strips(FIRST, SECOND),
    "num_tokens": 40,
    "num_segs": text.count("[SEG]"),
  }
  return Sample(**(values | fields))


def honest(text: str = GOOD_TEXT, **fields: object) -> Sample:
  """A right trace and answer whose masks are good, not perfect."""
  return sample(text, (22, 80), (150, 176), (150, 176), **fields)
