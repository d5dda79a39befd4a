"""Records of VRT -> pictures, COCO instances and a question file, as `import_data` reads them.

python -m scripts.export_data --data 'VRT-80k/*.tfrecord' --out coco
python -m scripts.export_data --data shapes/shapes_eval.tfrecord --out coco_eval

Pictures keep their bytes, masks become RLE, captions categories. What is written can be looked at
and edited with tools for COCO; `scripts.import_data --format coco` makes records of it again.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from vrt_jax import cli

if TYPE_CHECKING:
  from vrt_jax.data.records import EvalRecord, TrainRecord

UNSAFE = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class Args:
  """Writes OUT/images, OUT/instances.json and OUT/questions.jsonl."""

  data: str
  """Path or glob of TFRecord files, or the folder of a prepared set."""
  out: Path
  """Folder to write; must not exist."""
  kind: Literal["train", "eval"] | None = None
  """Record layout; found out unless given."""


@dataclass
class CocoFile:
  """A COCO instances file that grows picture by picture."""

  images: list[dict] = field(default_factory=list)
  annotations: list[dict] = field(default_factory=list)
  categories: dict[str, int] = field(default_factory=dict)

  def add_image(self, file_name: str, size: tuple[int, int]) -> None:
    """The picture that the next objects belong to; `size` is (height, width)."""
    height, width = size
    entry = {"id": len(self.images) + 1, "file_name": file_name, "height": height, "width": width}
    self.images.append(entry)

  def add_object(self, caption: str, segmentation: Any) -> int:
    """An object of the newest picture as the union of its RLEs; gives its annotation id.

    Raises ValueError where the mask does not decode, is of another size or empty.
    """
    import numpy as np

    from vrt_jax.data.transforms import object_mask
    from vrt_jax.ops.masks import encode_rle

    image = self.images[-1]
    mask = object_mask(segmentation, (image["height"], image["width"]), caption)
    if not mask.any():
      raise ValueError(f"empty mask: {caption}")
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    (top, left), (bottom, right) = ((int(rows[i]), int(columns[i])) for i in (0, -1))
    self.annotations.append(
      {
        "id": len(self.annotations) + 1,
        "image_id": image["id"],
        "category_id": self.categories.setdefault(caption, len(self.categories) + 1),
        "segmentation": encode_rle(mask.astype(bool)),
        "area": int(mask.sum()),
        "bbox": [left, top, right - left + 1, bottom - top + 1],
        "iscrowd": 0,
      }
    )
    return len(self.annotations)

  def text(self) -> str:
    """The file."""
    categories = [{"id": number, "name": name} for name, number in self.categories.items()]
    content = {"images": self.images, "annotations": self.annotations, "categories": categories}
    return json.dumps(content)


def train_entry(record: "TrainRecord", coco: CocoFile) -> dict:
  """The entry of the question file; raises ValueError where the record could not be trained on."""
  from vrt_jax.data.checks import check_train_record
  from vrt_jax.data.trace import object_annotations

  candidate = record.annotation["generated_ver_data"]["candidates"][0]
  check_train_record(record, thinking="reasoning" in candidate)
  entry = {"question": candidate["question"], "answer": candidate["answer_caption"]}
  if "reasoning" in candidate:
    entry["reasoning"] = candidate["reasoning"]
  return entry | {"objects": _objects(object_annotations(record.annotation), entry, coco)}


def eval_entry(record: "EvalRecord", coco: CocoFile) -> dict:
  """The entry of the question file; raises ValueError where the record could not be evaluated.

  Reference texts that do not mention the labelled objects, in their order, give way to a list.
  """
  from vrt_jax.data.checks import check_eval_record

  check_eval_record(record)
  entry = {
    "question": record.question,
    "reasoning": _mentioning(record.reference_reasoning, record.reasoning_ids, "ver"),
    "answer": _mentioning(record.reference_answer, record.answer_ids, "vea"),
    "class_ids": record.class_ids,
    "confidence": record.confidence,
  }
  annotations = {
    f"<obj{name}>": {"caption": info["caption"], "segmentation": info["mask"]}
    for name, info in record.objects.items()
  }
  return entry | {"objects": _objects(annotations, entry, coco)}


def _objects(annotations: dict, entry: dict, coco: CocoFile) -> dict[str, int]:
  """{tag: annotation id}; an object that no text mentions is left out where it has no mask."""
  texts = entry.get("reasoning", "") + entry["answer"]
  found = {}
  for tag, info in annotations.items():
    try:
      found[tag] = coco.add_object(str(info.get("caption", "")), info.get("segmentation"))
    except ValueError:
      if tag in texts:
        raise
  return found


def _mentioning(text: str | None, names: Sequence[str], mark: str) -> str:
  found = dict.fromkeys(str(int(number)) for number in re.findall(r"<obj(\d+)>", text or ""))
  if text and list(found) == list(names):
    return text
  return ", ".join(f"(<{mark}><obj{name}></{mark}>)" for name in names)


def file_name(key: str, picture: bytes, taken: set[str]) -> str:
  """A name for a picture that is not taken, made of its record's key."""
  ending = "png" if picture.startswith(b"\x89PNG") else "jpg"
  stem = name = UNSAFE.sub("_", key) or "picture"
  number = 1
  while f"{name}.{ending}" in taken:
    name, number = f"{stem}-{number}", number + 1
  taken.add(f"{name}.{ending}")
  return f"{name}.{ending}"


def main(args: Args) -> None:
  """Writes the folder and prints how much it holds.

  Raises:
    ValueError: --out exists, or a record cannot be used.
  """
  from scripts.inspect_data import open_source
  from vrt_jax.data.checks import picture_size

  if args.out.exists():
    raise ValueError(f"{args.out} exists: delete it or choose another --out")
  source, kind = open_source(args.data, args.kind)
  make_entry = train_entry if kind == "train" else eval_entry
  coco, lines, taken = CocoFile(), list[str](), set[str]()
  partial = args.out.with_name(f".{args.out.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  (partial / "images").mkdir(parents=True)
  try:
    for index in tqdm(range(len(source)), unit=" records"):
      record = source[index]
      try:
        name = file_name(record.key, record.image, taken)
        coco.add_image(name, picture_size(record.image))
        entry = {"image": name, "key": record.key, **make_entry(record, coco)}
      except ValueError as error:
        raise ValueError(f"record {index} ({record.key}): {error}") from None
      (partial / "images" / name).write_bytes(record.image)
      lines.append(json.dumps(entry, ensure_ascii=False))
    (partial / "instances.json").write_text(coco.text(), encoding="utf-8")
    (partial / "questions.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    partial.rename(args.out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  print(f"{args.out}: {len(lines)} {kind} records, {len(coco.annotations)} objects")


if __name__ == "__main__":
  cli.run(lambda: main(cli.parse(Args, sys.argv[1:], "python -m scripts.export_data", __doc__)))
