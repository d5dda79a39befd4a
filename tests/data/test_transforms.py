"""Records to padded arrays, on the shapes world and on real photographs."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests import tiny
from vrt_jax.config import DataConfig, ImageConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.records import TrainRecord, read_train_records
from vrt_jax.data.trace import evaluation_user_text
from vrt_jax.data.transforms import (
  choose_bucket,
  choose_mentions,
  collate,
  make_example,
  make_prompt,
  object_mask,
  pad_inputs,
  small_object_mask,
)
from vrt_jax.ops.masks import decode_rle, encode_rle
from vrt_jax.types import IGNORE_INDEX


def example(index: int = 0, record: TrainRecord | None = None, **data: object):
  config = dataclasses.replace(tiny.train_config().data, **data)
  record = record or tiny.train_record(index)
  return make_example(record, tiny.tokenizer(), config, tiny.IMAGE, np.random.default_rng(0))


def test_object_mask_of_one_rle_and_the_union_of_a_list():
  a, b = np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8)
  a[0, :2] = 1
  b[0, 1:3] = b[3, 4] = 1
  rles = [encode_rle(a), encode_rle(b)]
  np.testing.assert_array_equal(object_mask(rles[0], (4, 5), "<obj1>"), a)
  union = object_mask(rles, (4, 5), "<obj1>")
  np.testing.assert_array_equal(union, a | b)
  small = small_object_mask(rles, (4, 5), "<obj1>", (2, 3), "nearest")
  np.testing.assert_array_equal(small, (a | b)[::2][:, [0, 1, 3]])
  assert union.dtype == small.dtype == np.uint8


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    (encode_rle(np.ones((5, 4))), r"^mask size: <obj1> is \(5, 4\), its image \(4, 5\)"),
    ([encode_rle(np.ones((4, 5))), encode_rle(np.ones((4, 4)))], "^mask size: <obj1>"),
    ([], "^bad mask: <obj1>"),
    ({"size": [4, 5], "counts": [3]}, "^RLE: "),
    ([[0.0, 0.0, 1.0, 1.0]], "^RLE: "),  # a polygon
  ],
)
def test_unusable_masks_raise_one_line(segmentation: object, message: str):
  with pytest.raises(ValueError, match=message) as error:
    object_mask(segmentation, (4, 5), "<obj1>")
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError) as small_error:
    small_object_mask(segmentation, (4, 5), "<obj1>", (2, 2), "nearest")
  assert str(small_error.value) == str(error.value)


def test_choose_mentions():
  rng = np.random.default_rng(0)
  assert choose_mentions(3, 5, rng) == [0, 1, 2, 0, 1]
  assert choose_mentions(5, 5, rng) == [0, 1, 2, 3, 4]
  drawn = [tuple(choose_mentions(7, 5, rng)) for _ in range(50)]
  assert all(len(set(d)) == 5 and list(d) == sorted(d) for d in drawn)
  assert set(sum(drawn, ())) == set(range(7))
  assert len(set(drawn)) > 5


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_example_fields_agree(mode):
  made = example(num_objects=5, mask_resize=mode)
  record, seg = tiny.train_record(0), tiny.tokenizer().seg_id
  assert len(made.input_ids) == len(made.labels)
  assert (made.input_ids[made.seg_positions] == seg).all()
  assert made.masks.shape == (5, 16, 16)
  assert made.grids == ((1, 8, 8),)
  assert made.patches.shape == (64, 96)
  pads = (made.input_ids == tiny.tokenizer().image_pad_id).sum()
  assert pads == 16
  answered = made.labels != IGNORE_INDEX
  np.testing.assert_array_equal(made.input_ids[answered], made.labels[answered])
  text = tiny.tokenizer().decode(made.labels[answered])
  assert text.startswith("<think>")
  assert text.endswith("</answer><|im_end|>")
  objects = record.annotation["original_annotation"]["objects_anns"]
  reasoning = record.annotation["generated_ver_data"]["candidates"][0]["reasoning"]
  tag = reasoning[reasoning.index("<obj") :].partition(">")[0] + ">"
  mask = torch.tensor(decode_rle(objects[tag]["segmentation"]))[None, None].float()
  expected = F.interpolate(mask, (16, 16), mode=mode)[0, 0].numpy()
  np.testing.assert_array_equal(made.masks[0], expected)


def test_without_thinking_only_the_answer_is_trained():
  made = example(thinking=False)
  text = tiny.tokenizer().decode(made.labels[made.labels != IGNORE_INDEX])
  assert "<think>" not in text
  assert "<vea>" not in text
  assert "[SEG]" in text


def test_both_think_prompts_are_drawn():
  rng = np.random.default_rng(0)
  config = tiny.train_config().data
  texts = {
    tiny.tokenizer().decode(
      make_example(tiny.train_record(0), tiny.tokenizer(), config, tiny.IMAGE, rng).input_ids
    )
    for _ in range(12)
  }
  assert len({"respond with segmentation mask" in t for t in texts}) == 2


def test_a_repeated_object_gets_one_mask_a_mention():
  record = tiny.train_record(0)
  tag = next(iter(record.annotation["original_annotation"]["objects_anns"]))
  candidate = {
    "question": "Which?",
    "reasoning": f"A (<ver>{tag}</ver>) and again (<ver>{tag}</ver>)",
    "answer_caption": f"It (<vea>{tag}</vea>)",
    "answer_objects": [tag],
  }
  record = tiny.with_annotation(record, "twice", generated_ver_data={"candidates": [candidate]})
  made = example(record=record, num_objects=3)
  assert len(set(made.seg_positions.tolist())) == 3
  assert (made.masks == made.masks[0]).all()


def changed_object(change: dict | None) -> TrainRecord:
  """A record of which every object's annotation is replaced by `change`."""
  record = tiny.train_record(0)
  objects = record.annotation["original_annotation"]["objects_anns"]
  return tiny.with_annotation(
    record, "bad", original_annotation={"objects_anns": dict.fromkeys(objects, change)}
  )


@pytest.mark.parametrize(
  ("record", "reason"),
  [
    (lambda: TrainRecord("k", b"no jpeg", tiny.train_record(0).annotation), "corrupt image"),
    (
      lambda: TrainRecord("k", tiny.train_record(0).image[:-200], tiny.train_record(0).annotation),
      "corrupt image",
    ),
    (lambda: changed_object({"segmentation": encode_rle(np.ones((3, 3)))}), "mask size"),
    (lambda: changed_object({"segmentation": []}), "bad mask"),
    (lambda: changed_object({"caption": "no mask"}), "bad mask"),
    (lambda: changed_object(None), "bad mask"),
  ],
)
def test_unusable_records_raise_their_reason(record, reason: str):
  with pytest.raises(ValueError, match=f"^{reason}: "):
    example(record=record())


def test_records_that_exceed_the_largest_bucket():
  with pytest.raises(ValueError, match=r"^too many patches: 64 of at most 60"):
    example(buckets=((384, 60),))
  with pytest.raises(ValueError, match=r"^too long: "):
    example(buckets=((100, 64),))


def test_blind_noise_depends_on_the_picture_alone():
  image = tiny.train_record(0).image

  def prompt(data: bytes, blind: bool):
    return make_prompt(
      data, "<image>\nHi", tiny.tokenizer(), tiny.IMAGE, inference=True, blind=blind
    )

  seen, size = prompt(image, False)
  first, blind_size = prompt(image, True)
  again, _ = prompt(image, True)
  other, _ = prompt(tiny.train_record(1).image, True)
  assert size == blind_size
  np.testing.assert_array_equal(first.patches, again.patches)
  np.testing.assert_array_equal(first.grounding_image, again.grounding_image)
  np.testing.assert_array_equal(first.input_ids, seen.input_ids)
  assert (first.patches != seen.patches).mean() > 0.9
  assert (first.grounding_image != other.grounding_image).mean() > 0.9


def test_choose_bucket_takes_the_first_that_holds_all():
  samples = [example(0), example(1)]
  tokens = max(len(s.input_ids) for s in samples)
  small, exact, large = (tokens - 1, 64), (tokens, 64), (999, 999)
  assert choose_bucket(samples, (small, exact, large)) == exact
  assert choose_bucket(samples, ((tokens, 63), large)) == large
  with pytest.raises(ValueError, match=f"^too long: {tokens} tokens and 64 patches"):
    choose_bucket(samples, (small,))


def test_collate_pads_every_field():
  examples = [example(0), example(1)]
  lengths = [len(e.input_ids) for e in examples]
  assert lengths[0] != lengths[1]
  batch = collate(examples, tiny.tokenizer(), tiny.MODEL, tiny.IMAGE, ((384, 80), (999, 999)))
  assert batch.text.input_ids.shape == (2, 384)
  assert batch.text.position_ids.shape == (3, 2, 384)
  assert batch.vision.pixel_values.shape == (2, 80, 96)
  assert batch.vision.pixel_values.dtype == np.uint8
  assert batch.grounding_image.shape == (2, 64, 64, 3)
  for i, e in enumerate(examples):
    n, p = len(e.input_ids), len(e.patches)
    np.testing.assert_array_equal(batch.text.token_mask[i], np.arange(384) < n)
    np.testing.assert_array_equal(batch.text.input_ids[i, :n], e.input_ids)
    assert not batch.text.input_ids[i, n:].any()
    assert (batch.targets.labels[i, n:] == IGNORE_INDEX).all()
    assert (batch.text.visual_index[i, n:] == -1).all()
    visual = batch.text.visual_index[i]
    assert visual[visual >= 0].tolist() == list(range(p // 4))
    assert (batch.vision.patch_segments[i] == (np.arange(80) < p)).all()
    assert not batch.vision.pixel_values[i, p:].any()
    assert not batch.vision.pos_embed_weight[i, p:].any()
    np.testing.assert_allclose(batch.vision.pos_embed_weight[i, :p].sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(batch.targets.seg_positions[i], e.seg_positions)
  assert batch.targets.masks.shape == (2, 2, 16, 16)
  assert batch.targets.seg_valid.all()


def test_pad_inputs_gives_the_position_of_the_first_new_token():
  prompt, _ = make_prompt(
    tiny.train_record(0).image, "<image>\nHi", tiny.tokenizer(), tiny.IMAGE, inference=True
  )
  text, _, deltas = pad_inputs([prompt], (160, 64), tiny.tokenizer(), tiny.IMAGE, 4)
  n = len(prompt.input_ids)
  assert text.position_ids[:, 0, n - 1].tolist() == [n - 1 + deltas[0]] * 3
  assert deltas[0] == 4 - 16  # an image of 4x4 visual tokens advances by 4


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[TrainRecord]:
  return list(read_train_records(str(shared_data / "photos" / "photos_train.tfrecord")))


@pytest.fixture(scope="module")
def real_tokenizer(shared_data: Path) -> ChatTokenizer:
  return ChatTokenizer.from_dir(shared_data / "qwen3-tokenizer")


REAL_IMAGE = ImageConfig(
  patch_size=16,
  min_pixels=401408,
  max_pixels=1605632,
  inference_factor_px=28,
  grounding_size_px=1024,
)


def test_real_photos_at_the_sizes_of_the_reference(
  photos: list[TrainRecord], real_tokenizer: ChatTokenizer
):
  data = DataConfig(buckets=((8192, 6400),), num_objects=5)
  for record in photos[:3]:
    made = make_example(record, real_tokenizer, data, REAL_IMAGE, np.random.default_rng(0))
    _, rows, columns = made.grids[0]
    assert 401408 <= rows * columns * 256 <= 1605632
    assert rows % 2 == columns % 2 == 0
    assert made.patches.shape == (rows * columns, 1536)
    assert (made.input_ids == 151655).sum() == rows * columns // 4
    assert made.input_ids[made.seg_positions].tolist() == [151669] * 5
    assert made.grounding_image.shape == (1024, 1024, 3)
    assert made.masks.shape == (5, 256, 256)
    assert set(np.unique(made.masks)) <= {0, 1}
    assert made.masks.any(axis=(1, 2)).all()
    assert (made.labels == 151669).sum() >= 1
    assert made.labels[-2:].tolist() == [151645, IGNORE_INDEX]


def test_a_photo_has_another_grid_at_inference(
  photos: list[TrainRecord], real_tokenizer: ChatTokenizer
):
  """640x427: [1, 34, 50] in training; [1, 32, 50] after qwen_vl_utils's multiples of 28."""
  buffer = io.BytesIO()
  with Image.open(io.BytesIO(photos[0].image)) as picture:
    picture.convert("RGB").resize((640, 427)).save(buffer, "PNG")
  grids = [
    make_prompt(
      buffer.getvalue(),
      evaluation_user_text("What?"),
      real_tokenizer,
      REAL_IMAGE,
      inference=inference,
    )[0].grids
    for inference in (False, True)
  ]
  assert grids == [((1, 34, 50),), ((1, 32, 50),)]
