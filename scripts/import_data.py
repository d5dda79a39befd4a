"""Own pictures, masks and questions -> a TFRecord file in a record layout of VRT.

python -m scripts.import_data --format coco --questions q.jsonl --images photos/
    --annotations instances.json --out own.tfrecord
python -m scripts.import_data --format labelme --annotations shapes/ --kind eval ..
python -m scripts.import_data --format masks --annotations pngs/ ..

The question file is described in docs/data.md. All that is wrong is listed at once, and then
nothing is written.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from vrt_jax import cli

if TYPE_CHECKING:
  from scripts.annotations.questions import Annotations, Question


@dataclass(frozen=True)
class Args:
  """Writes own data as training or evaluation records."""

  format: Literal["coco", "labelme", "masks"]
  """COCO instances, LabelMe shapes, or PNG masks."""
  questions: Path
  """JSON list or lines of JSON, an entry a sample."""
  images: Path
  """Folder of the pictures that the questions name."""
  annotations: Path
  """The COCO file, or the folder of LabelMe files or of PNG masks."""
  out: Path
  """TFRecord file to write."""
  kind: Literal["train", "eval"] = "train"
  """Record layout: VRT-80k or VRT-Eval."""


def _open_annotations(args: Args) -> "Annotations":
  from scripts.annotations.coco import CocoAnnotations
  from scripts.annotations.labelme import LabelmeAnnotations
  from scripts.annotations.pngs import PngMasks

  if args.format == "coco":
    return CocoAnnotations(args.annotations)
  if not args.annotations.is_dir():
    raise ValueError(f"--annotations {args.annotations} is not a folder")
  return (
    LabelmeAnnotations(args.annotations) if args.format == "labelme" else PngMasks(args.annotations)
  )


def _parse(path: Path, problems: list[str]) -> list[tuple[str, str, "Question"]]:
  """(place in the file, key, question) of every sound entry; what is wrong joins `problems`."""
  from scripts.annotations.questions import make_keys, parse_entry, read_entries

  sound = []
  for place, entry in read_entries(path):
    question, found = parse_entry(entry)
    problems += [f"{place}: {problem}" for problem in found]
    if question is not None:
      sound.append((place, question))
  keys, doubles = make_keys([question for _, question in sound])
  problems += doubles
  return [(place, key, question) for (place, question), key in zip(sound, keys, strict=True)]


def _serialize(
  key: str, question: "Question", images: Path, annotations: "Annotations", kind: str
) -> tuple[bytes | None, list[str]]:
  """(record, problems) of one question."""
  from scripts.annotations.questions import eval_record, find_objects, read_picture, train_record
  from vrt_jax.data.records import serialize_eval, serialize_train

  try:
    image, size = read_picture(images / question.image)
  except ValueError as error:
    return None, [str(error)]
  objects, problems = find_objects(question, size, annotations)
  if problems:
    return None, problems
  try:
    if kind == "train":
      return serialize_train(train_record(key, image, question, objects)), []
    return serialize_eval(eval_record(key, image, question, objects)), []
  except ValueError as error:
    return None, [str(error)]


def main(args: Args) -> None:
  """Writes the records and prints how many.

  Raises:
    ValueError: lists every problem of the questions, pictures and annotations.
  """
  from vrt_jax.data.tfrecord import TFRecordWriter

  if args.out.exists():
    raise ValueError(f"{args.out} exists: delete it or choose another --out")
  if not args.out.parent.is_dir():
    raise ValueError(f"the folder of --out {args.out} does not exist")
  annotations = _open_annotations(args)
  problems: list[str] = []
  samples = _parse(args.questions, problems)
  with TFRecordWriter(args.out) as writer:
    for place, key, question in tqdm(samples, unit=" samples"):
      record, found = _serialize(key, question, args.images, annotations, args.kind)
      problems += [f"{place}: {problem}" for problem in found]
      if record is not None:
        writer.write(record)
    if problems:
      raise ValueError(f"{len(problems)} problems in {args.questions}: {'; '.join(problems)}")
  alone = sum(question.reasoning is None for _, _, question in samples)
  note = f", {alone} of them answers without reasoning" if alone else ""
  print(f"{args.out}: {len(samples)} {args.kind} records{note}")


if __name__ == "__main__":
  cli.run(lambda: main(cli.parse(Args, sys.argv[1:], "python -m scripts.import_data", __doc__)))
