"""Referring segmentation (RefCOCO, gRefCOCO, own data): cIoU, gIoU and precision of the masks.

    python -m eval.refcoco --checkpoint DIR --refs refs.json --instances instances.json \\
      --images train2014/ --split val --out DIR

Checks the mask road alone: each expression is asked without reasoning, and the union of the
answer's masks is compared with the union of the objects it means. cIoU is the sum of all
intersections over the sum of all unions, gIoU the mean IoU of the expressions; an expression that
means nothing counts 1 in gIoU where no mask is predicted, else 0 (gRefCOCO, arXiv 2306.00968).

All devices of a machine share a batch (`--batch-size 8`), and those of several processes too.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from tqdm import tqdm

from converters.checkpoints import find_model
from scripts.annotations.coco import CocoAnnotations
from vrt_jax import cli
from vrt_jax.code_version import code_version
from vrt_jax.config import EvalConfig, MeshConfig
from vrt_jax.evaluate import short_hash
from vrt_jax.files import write_whole
from vrt_jax.generate.batches import batch_order, batch_size_of, choose_buckets, coarse_bucket
from vrt_jax.generate.predictor import Prediction, Predictor, Request
from vrt_jax.model_directory import load
from vrt_jax.ops.masks import Mask, Rle, as_rle, encode_rle, union_rle
from vrt_jax.partial import Partial
from vrt_jax.runtime import is_leader, mesh_of_several, say, start_processes

RESULTS_FILE = "refcoco_results.json"
PARTIAL_FILE = "partial.jsonl"
QUESTION = "Please segment {} in this image."
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Args:
  """Scores referring segmentation on COCO-format data."""

  refs: Path
  """JSON list of {"ref_id", "image_id", "ann_id", "split", "sentences": [{"sent"}]}; ann_id is one
  id, a list of ids, or [] for nothing."""
  instances: Path
  """COCO instances file."""
  images: Path
  """Folder of the pictures."""
  out: Path
  """Folder for refcoco_results.json."""
  split: str = "val"
  """Entries of this split are scored; empty for all."""
  checkpoint: str = "shapes"
  """As of eval.vrt_bench."""
  max_new_tokens: int = 512
  max_masks: int = 16
  batch_size: int = 1
  """Rounded up to a multiple of the devices that `mesh` divides a batch over."""
  num_samples: int = 0
  """Expressions that are scored, from the first; 0 for all."""
  mesh: MeshConfig = field(default_factory=MeshConfig)
  """As of eval.vrt_bench."""


@dataclass(frozen=True)
class Expression:
  """One sentence, its picture and the union of what it means."""

  key: str
  image: Path
  sentence: str
  target: Rle


def read_expressions(args: Args) -> list[Expression]:
  """Every sentence of the split, in order.

  Raises:
    ValueError: names the entry that is malformed, or whose picture or annotation is missing.
  """
  try:
    refs = json.loads(args.refs.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{args.refs} is not JSON: {error}") from None
  if not isinstance(refs, list):
    raise ValueError(f"{args.refs} is not a JSON list")
  annotations = CocoAnnotations(args.instances)
  found: list[Expression] = []
  for position, ref in enumerate(refs):
    try:
      if args.split and ref.get("split") != args.split:
        continue
      found += _expressions(ref, annotations, args.images)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
      what = f"no {error}" if isinstance(error, KeyError) else str(error)
      raise ValueError(f"{args.refs}, entry {position}: {what}") from error
    if args.num_samples and len(found) >= args.num_samples:
      return found[: args.num_samples]
  if not found:
    raise ValueError(f'{args.refs} has no expressions of the split "{args.split}"')
  return found


def _expressions(
  ref: Mapping[str, Any], annotations: CocoAnnotations, images: Path
) -> list[Expression]:
  name = annotations.file_name(ref["image_id"])
  with Image.open(images / name) as picture:
    size = (picture.height, picture.width)
  ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
  ids = [i for i in ids if i != -1]  # gRefCOCO's mark for nothing
  masks = [annotations.find(name, size, i)[0] for i in ids]
  target = union_rle(masks) if masks else encode_rle(np.zeros(size, bool))
  return [
    Expression(f"{ref['ref_id']}-{i}", images / name, sentence["sent"], target)
    for i, sentence in enumerate(ref["sentences"])
  ]


def overlap(pred: Mask, target: Mask) -> tuple[int, int]:
  """Pixels of intersection and union of two masks of one size."""
  pair = [as_rle(pred), as_rle(target)]
  both = coco.merge(pair, intersect=True)
  either = coco.merge(pair, intersect=False)
  return int(coco.area(both)), int(coco.area(either))


def summary(overlaps: Sequence[tuple[int, int]], means_nothing: Sequence[bool]) -> dict[str, float]:
  """`ciou`, `giou`, `precision@T` of expressions with a target, and `no_target_accuracy`.

  Example: overlaps (30, 60) and (0, 40) give cIoU 30 / 100 and gIoU (0.5 + 0) / 2.
  """
  ious = [
    (1.0 if union == 0 else 0.0) if nothing else shared / union
    for (shared, union), nothing in zip(overlaps, means_nothing, strict=True)
  ]
  total = sum(union for _, union in overlaps)
  meant = [iou for iou, nothing in zip(ious, means_nothing, strict=True) if not nothing]
  empty = [iou for iou, nothing in zip(ious, means_nothing, strict=True) if nothing]
  numbers = {
    "ciou": sum(shared for shared, _ in overlaps) / total if total else 0.0,
    "giou": float(np.mean(ious)) if ious else 0.0,
    "no_target_accuracy": float(np.mean(empty)) if empty else 0.0,
  }
  for threshold in THRESHOLDS:
    share = float(np.mean([iou > threshold for iou in meant])) if meant else 0.0
    numbers[f"precision@{threshold}"] = share
  return numbers


def evaluate(args: Args) -> dict[str, Any]:
  """Asks, scores and writes; returns the content of the results file.

  Raises:
    ValueError: the model directory or the data cannot be used.
  """
  expressions, mesh = read_expressions(args), mesh_of_several(args.mesh)
  loaded = load(find_model(args.checkpoint, args.out), mesh=mesh)
  sizes = [
    coarse_bucket(loaded, _request(expression), thinking=False)
    for expression in tqdm(expressions, desc="prompts", unit="expression", disable=not is_leader())
  ]
  config = EvalConfig(
    batch_size=batch_size_of(args.batch_size, len(expressions), mesh),
    max_new_tokens=args.max_new_tokens,
    max_masks=args.max_masks,
    prompt_buckets=choose_buckets(sizes),
  )
  settings = [args.checkpoint, asdict(config), short_hash([asdict(loaded.model.config)])]
  settings.append(short_hash([(e.key, e.sentence) for e in expressions]))
  partial = Partial(args.out / PARTIAL_FILE, json.loads(json.dumps(settings)))
  predictor = Predictor(loaded, config, thinking=False, mesh=mesh)
  found = _answers(predictor, expressions, batch_order(sizes), config, partial)
  samples = [
    {"key": e.key, "sentence": e.sentence, "nothing": not coco.area(e.target), **found[i]}
    for i, e in enumerate(expressions)
  ]
  overlaps = [overlap(s["rle"], e.target) for s, e in zip(samples, expressions, strict=True)]
  results = {
    "model_path": args.checkpoint,
    "config_hash": short_hash(settings),
    "code_version": code_version(),
    "split": args.split,
    "expressions": len(samples),
    "metrics": summary(overlaps, [s["nothing"] for s in samples]),
    "samples": [
      s | {"intersection": shared, "union": union}
      for s, (shared, union) in zip(samples, overlaps, strict=True)
    ],
  }
  if is_leader():
    write_whole(args.out / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
  partial.remove()
  return results


def _request(expression: Expression) -> Request:
  return Request(expression.image.read_bytes(), QUESTION.format(expression.sentence))


def _answers(
  predictor: Predictor,
  expressions: Sequence[Expression],
  order: Sequence[int],
  config: EvalConfig,
  partial: Partial,
) -> dict[int, dict[str, Any]]:
  """{"text", "rle"} of each expression, its masks' union, from `partial` as far as it goes."""
  found: dict[int, dict[str, Any]] = {}
  size = config.batch_size
  with tqdm(total=len(order), desc="answers", unit="expression", disable=not is_leader()) as bar:
    for position, start in enumerate(range(0, len(order), size)):
      numbers = order[start : start + size]
      if position == len(partial.entries):
        requests = [_request(expressions[i]) for i in numbers]
        answers = predictor.predict(requests)
        pairs = zip(numbers, answers, strict=True)
        partial.add([_entry(answer, expressions[i].target) for i, answer in pairs])
      found |= dict(zip(numbers, partial.entries[position], strict=True))
      bar.update(len(numbers))
  return found


def _entry(answer: Prediction, target: Rle) -> dict[str, Any]:
  """The union of an answer's masks, empty where it has none."""
  masks = list(answer.masks)
  union = union_rle(masks) if masks else encode_rle(np.zeros(target["size"], bool))
  return {"text": answer.text, "rle": union}


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m eval.refcoco", __doc__)
  start_processes()
  results = evaluate(args)
  metrics = results["metrics"]
  say(
    f"cIoU {100 * metrics['ciou']:.1f}  gIoU {100 * metrics['giou']:.1f}"
    f"  P@0.5 {100 * metrics['precision@0.5']:.1f}  ({results['expressions']} expressions)"
  )
  say(f"written to {args.out / RESULTS_FILE}")


if __name__ == "__main__":
  cli.run(main)
