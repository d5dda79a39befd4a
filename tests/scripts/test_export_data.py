"""Records as COCO and back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from scripts import export_data, import_data
from vrt_jax.data.records import (
  EvalRecord,
  TFRecordWriter,
  read_eval_records,
  read_train_records,
  serialize_eval,
  serialize_train,
)
from vrt_jax.data.shapes import write_shapes
from vrt_jax.ops.masks import decode_rle, encode_rle


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> tuple[str, str]:
  """A training and an evaluation file."""
  folder = tmp_path_factory.mktemp("shapes")
  return tuple(write_shapes(str(folder), 3, 3, seed=5, workers=1))


def there_and_back(data: str, folder: Path, kind: str) -> Path:
  coco, out = folder / "coco", folder / "back.tfrecord"
  export_data.main(export_data.Args(data=data, out=coco))
  import_data.main(
    import_data.Args(
      format="coco",
      questions=coco / "questions.jsonl",
      images=coco / "images",
      annotations=coco / "instances.json",
      out=out,
      kind=kind,
    )
  )
  return out


def test_training_records_come_back(shapes, tmp_path):
  before = list(read_train_records(shapes[0]))
  after = list(read_train_records(str(there_and_back(shapes[0], tmp_path, "train"))))
  assert [(r.key, r.image) for r in after] == [(r.key, r.image) for r in before]
  for old, new in zip(before, after, strict=True):
    texts = [
      {name: r.annotation["generated_ver_data"]["candidates"][0][name] for name in names}
      for names in [("question", "reasoning", "answer_caption", "answer_objects")]
      for r in (old, new)
    ]
    assert texts[0] == texts[1]
    objects = [r.annotation["original_annotation"]["objects_anns"] for r in (old, new)]
    assert list(objects[0]) == list(objects[1])
    for tag, info in objects[0].items():
      assert objects[1][tag]["caption"] == info["caption"]
      masks = [decode_rle(o[tag]["segmentation"]) for o in objects]
      assert np.array_equal(*masks) and masks[0].any()


def test_evaluation_records_come_back(shapes, tmp_path):
  before = list(read_eval_records(shapes[1]))
  after = list(read_eval_records(str(there_and_back(shapes[1], tmp_path, "eval"))))
  for old, new in zip(before, after, strict=True):
    for field in dataclasses.fields(EvalRecord):
      if field.name != "objects":
        assert getattr(new, field.name) == getattr(old, field.name), field.name
    assert list(new.objects) == list(old.objects)
    for name, info in old.objects.items():
      assert np.array_equal(decode_rle(new.objects[name]["mask"]), decode_rle(info["mask"]))


def test_boxes_and_areas_are_those_of_the_masks(shapes, tmp_path):
  there_and_back(shapes[0], tmp_path, "train")
  content = json.loads((tmp_path / "coco/instances.json").read_text())
  assert content["annotations"]
  for annotation in content["annotations"]:
    mask = decode_rle(annotation["segmentation"]).astype(bool)
    left, top, width, height = annotation["bbox"]
    inside = mask[top : top + height, left : left + width]
    assert inside.sum() == mask.sum() == annotation["area"]
    assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_texts_that_do_not_fit_the_labels_give_way_to_a_list(shapes, tmp_path):
  first = next(iter(read_eval_records(shapes[1])))
  wrong = dataclasses.replace(first, reference_reasoning="nothing", reference_answer=None)
  file = tmp_path / "wrong.tfrecord"
  with TFRecordWriter(file) as writer:
    writer.write(serialize_eval(wrong))
  (after,) = read_eval_records(str(there_and_back(str(file), tmp_path, "eval")))
  assert (after.reasoning_ids, after.answer_ids) == (first.reasoning_ids, first.answer_ids)


@pytest.mark.parametrize("mentioned", [False, True])
def test_an_object_without_a_mask(shapes, tmp_path, mentioned):
  record = next(iter(read_train_records(shapes[0])))
  annotation = json.loads(json.dumps(record.annotation))
  objects = annotation["original_annotation"]["objects_anns"]
  texts = annotation["generated_ver_data"]["candidates"][0]
  used = [tag for tag in objects if tag in texts["reasoning"] + texts["answer_caption"]]
  empty = encode_rle(np.zeros_like(decode_rle(objects[used[0]]["segmentation"]), bool))
  tag = used[0] if mentioned else "<obj99>"
  objects[tag] = {"caption": "nothing", "segmentation": empty}
  file = tmp_path / "empty.tfrecord"
  with TFRecordWriter(file) as writer:
    writer.write(serialize_train(dataclasses.replace(record, annotation=annotation)))
  out = tmp_path / "coco"
  if mentioned:
    with pytest.raises(ValueError, match=rf"record 0 \({record.key}\): empty mask"):
      export_data.main(export_data.Args(data=str(file), out=out))
    assert not list(tmp_path.glob("*coco*"))
  else:
    export_data.main(export_data.Args(data=str(file), out=out))
    (line,) = (out / "questions.jsonl").read_text().splitlines()
    assert tag not in json.loads(line)["objects"] and set(used) <= set(json.loads(line)["objects"])


def test_an_existing_folder_stays(shapes, tmp_path):
  with pytest.raises(ValueError, match="exists"):
    export_data.main(export_data.Args(data=shapes[0], out=tmp_path))
