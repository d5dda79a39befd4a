"""The embedded world: procedural pictures, questions and traces in the VRT record layouts.

numpy and Pillow only, so that worker processes start fast. Sample i of a split depends on
(seed, split, task, i) alone.
"""

import io
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from vrt_jax.cores import usable_cores
from vrt_jax.data.records import (
  EvalRecord,
  TFRecordWriter,
  TrainRecord,
  serialize_eval,
  serialize_train,
)
from vrt_jax.data.shapes_draw import is_visible, make_scene, render
from vrt_jax.data.shapes_framed import FRAMED_TASKS, framed
from vrt_jax.data.shapes_questions import FAMILIES, Trace
from vrt_jax.data.shapes_refer import TASKS, Request
from vrt_jax.data.shapes_scene import SPLITS, Scene, Shape, draft_scene

__all__ = [
  "corpus",
  "make_scene",
  "refer_sample",
  "refer_text",
  "render",
  "trace_sample",
  "trace_text",
  "write_shapes",
]

T = TypeVar("T")

Task = Literal["trace", "refer", "framed"]
_TASKS = ("trace", "refer", "framed")
_JPEG_QUALITY = 92
_CONFIDENCE = 5
_KEEP_LARGEST = 0.75
"""Share of the questions kept whose answer is the largest object, against guessing it."""
_KEEP_EXTREME = 0.8
"""Share of the questions kept whose answer is small or large, to balance the middle size."""


def _pick(rng: np.random.Generator, options: Sequence[tuple[float, T]]) -> T:
  """One of ((share, value), ...)."""
  shares = np.array([share for share, _ in options])
  return options[rng.choice(len(shares), p=shares / shares.sum())][1]


def trace_text(rng: np.random.Generator, split: str) -> tuple[Scene, Trace, str]:
  """Draws a scene with a question about it, and the question's class id; no pixels.

  The families have equal shares, whatever share of the scenes allows a question of each.
  """
  family = list(FAMILIES)[rng.integers(len(FAMILIES))]
  lister = _pick(rng, FAMILIES[family])
  themes = (("key", "lock"), ("plug", "socket"))
  while True:
    kinds = themes[rng.integers(2)] if family == "#func" else ()
    scene = draft_scene(rng, split, kinds)
    traces = lister(scene, rng)
    if not traces:
      continue
    trace = traces[rng.integers(len(traces))]
    keep = _KEEP_EXTREME if trace.answer.size else 1.0
    if trace.answer.radius == max(s.radius for s in scene.shapes):
      keep *= _KEEP_LARGEST
    if rng.random() < keep and is_visible(scene):
      return scene, trace, family


def refer_text(
  rng: np.random.Generator, split: str, in_frame: bool = False
) -> tuple[Scene, Request]:
  """Draws a scene and a referring request for it, one for `framed` if asked; no pixels."""
  task = _pick(rng, FRAMED_TASKS if in_frame else TASKS)
  while True:
    scene = draft_scene(rng, split)
    request = task(scene, rng)
    if request and is_visible(scene):
      return scene, request


def _picture(scene: Scene) -> tuple[bytes, dict[str, dict]]:
  """The JPEG file and the RLE of every shape by its tag, ordered by number."""
  picture, masks = render(scene)
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
  encoded = coco_mask.encode(np.asfortranarray(np.stack(masks, -1).astype(np.uint8)))
  shapes = sorted(zip(scene.shapes, encoded, strict=True), key=lambda pair: pair[0].number)
  return buffer.getvalue(), {
    shape.tag: {
      "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
      "caption": shape.phrase(),
    }
    for shape, rle in shapes
  }


def _train_record(key: str, image: bytes, objects: dict[str, dict], candidate: dict) -> TrainRecord:
  annotation = {
    "generated_ver_data": {"candidates": [candidate]},
    "original_annotation": {"objects_anns": objects},
    "image_name": f"{key}.jpg",
  }
  return TrainRecord(key, image, annotation)


def trace_sample(
  rng: np.random.Generator, split: str, key: str = "shapes"
) -> tuple[TrainRecord, EvalRecord]:
  """A reasoning question in both record layouts; `split` is "train" or "eval"."""
  scene, trace, family = trace_text(rng, split)
  image, objects = _picture(scene)
  candidate = {
    "question": trace.question,
    "reasoning": trace.reasoning,
    "answer_caption": trace.answer_caption,
    "answer_objects": [trace.answer.tag],
  }
  evaluation = EvalRecord(
    key=key,
    image=image,
    question=trace.question,
    objects={
      tag.removeprefix("<obj").removesuffix(">"): {
        "mask": info["segmentation"],
        "caption": info["caption"],
        "original_id": tag,
      }
      for tag, info in objects.items()
    },
    reasoning_ids=[str(s.number) for s in trace.evidence],
    answer_ids=[str(trace.answer.number)],
    class_ids=[family],
    confidence=_CONFIDENCE,
    reference_reasoning=trace.reasoning,
    reference_answer=trace.answer_caption,
  )
  return _train_record(key, image, objects, candidate), evaluation


def refer_sample(
  rng: np.random.Generator, split: str, key: str = "shapes", in_frame: bool = False
) -> TrainRecord:
  """A referring request without a trace, for base training; `split` as in `trace_sample`.

  `in_frame` writes its mentions where a trace has its evidence, one of them as the answer, and adds
  remarks.
  """
  scene, request = refer_text(rng, split, in_frame)
  image, objects = _picture(scene)
  if in_frame:
    question, reasoning, answer_caption, answer = framed(scene, request, rng)
    answers: tuple[Shape, ...] = (answer,)
  else:
    question, reasoning, answer_caption = request.question, "", request.answer_caption
    answers = request.answers
  candidate = {
    "question": question,
    "reasoning": reasoning,
    "answer_caption": answer_caption,
    "answer_objects": list(dict.fromkeys(s.tag for s in answers)),
  }
  return _train_record(key, image, objects, candidate)


@dataclass(frozen=True)
class _Job:
  """One sample to be made by a worker."""

  seed: int
  split: str
  task: Task
  index: int


def _rng(job: _Job) -> np.random.Generator:
  return np.random.default_rng(
    (job.seed, SPLITS.index(job.split), _TASKS.index(job.task), job.index)
  )


def _make(job: _Job) -> bytes:
  key = f"shapes_{job.split}_{job.task}_{job.seed}_{job.index:07d}"
  if job.task != "trace":
    return serialize_train(refer_sample(_rng(job), job.split, key, job.task == "framed"))
  train, evaluation = trace_sample(_rng(job), job.split, key)
  return serialize_train(train) if job.split == "train" else serialize_eval(evaluation)


def _run(jobs: list[_Job], workers: int) -> Iterator[bytes]:
  """The records of the jobs in order."""
  if workers <= 1 or len(jobs) < 200:
    yield from map(_make, jobs)
    return
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(workers, mp_context=context) as pool:
    yield from pool.map(_make, jobs, chunksize=32)


def write_shapes(
  out_dir: str | os.PathLike,
  num_train: int,
  num_eval: int,
  seed: int,
  task: Task = "trace",
  num_shards: int = 1,
  workers: int | None = None,
  progress: bool = True,
) -> list[str]:
  """Writes the shapes world to TFRecord files; the same arguments give the same bytes.

  Args:
    out_dir: made where it is missing.
    num_train: samples of `shapes_train-*-of-*.tfrecord` (VRT-80k layout).
    num_eval: samples of `shapes_eval.tfrecord` (VRT-Eval layout); trace task only.
    seed: non-negative.
    task: "trace" (reasoning questions), or for base training "refer" (requests without traces)
      and "framed" (the same with the marks of a trace).
    num_shards: files the training samples are spread over.
    workers: processes; one a usable core where None.
    progress: whether to show a progress bar.

  Returns:
    the paths written. Raises ValueError for an unknown task or an impossible count.
  """
  if task not in _TASKS:
    raise ValueError(f"unknown task {task!r}; use one of {', '.join(_TASKS)}")
  if task != "trace" and num_eval:
    raise ValueError(f"the {task} task has no evaluation layout; use num_eval=0")
  if min(num_train, num_eval, seed) < 0 or num_shards < 1:
    raise ValueError("num_train, num_eval and seed must be >= 0, and num_shards >= 1")
  if 0 < num_train < num_shards:
    raise ValueError(f"{num_train} samples do not fill {num_shards} shards")
  os.makedirs(out_dir, exist_ok=True)
  plan: list[tuple[str, list[_Job]]] = []
  for shard in range(num_shards if num_train else 0):
    start, stop = (num_train * s // num_shards for s in (shard, shard + 1))
    jobs = [_Job(seed, "train", task, i) for i in range(start, stop)]
    plan.append((f"shapes_train-{shard:05d}-of-{num_shards:05d}.tfrecord", jobs))
  if num_eval:
    jobs = [_Job(seed, "eval", task, i) for i in range(num_eval)]
    plan.append(("shapes_eval.tfrecord", jobs))
  records = _run([job for _, jobs in plan for job in jobs], workers or usable_cores())
  paths = []
  with tqdm(total=num_train + num_eval, disable=not progress, desc="shapes") as bar:
    for name, jobs in plan:
      paths.append(os.path.join(out_dir, name))
      with TFRecordWriter(paths[-1]) as writer:
        for data in itertools.islice(records, len(jobs)):
          writer.write(data)
          bar.update()
  return paths


def corpus(num_samples: int, seed: int) -> list[str]:
  """Questions, traces and answers of both tasks, for training a tokenizer."""
  texts = []
  for index in range(num_samples):
    rng = np.random.default_rng((seed, len(SPLITS), index))
    if index % 2:
      _, request = refer_text(rng, "train")
      texts += [request.question, request.answer_caption]
    else:
      _, trace, _ = trace_text(rng, "train")
      texts += [
        trace.question,
        f"<think>{trace.reasoning}</think>\n\n<answer>{trace.answer_caption}</answer>",
      ]
  return texts
