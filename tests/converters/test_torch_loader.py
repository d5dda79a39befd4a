"""The PyTorch side of the data measurement does the same work: its tensors equal our arrays."""

import numpy as np
import pytest
import torch

from converters.torch_loader import LoaderConfig, make_loader
from tests import tiny
from vrt_jax.config import DataConfig
from vrt_jax.data.image import normalize_patches
from vrt_jax.data.transforms import Example, make_example

RECORDS = 4
ORDER = [2, 0, 3, 1]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
  folder = tmp_path_factory.mktemp("loader")
  path = tiny.write_train(folder / "train.tfrecord", [tiny.train_record(i) for i in range(RECORDS)])
  tiny.tokenizer().save(folder / "tokenizer")
  config = LoaderConfig(path, str(folder / "tokenizer"), tiny.IMAGE, batch_size=1, num_workers=0)
  return list(make_loader(config, ORDER))


def ours(record: int, think_prompt: int, num_objects: int) -> Example:
  data = DataConfig(buckets=((600, 64),), num_objects=num_objects)
  seed = next(s for s in range(99) if np.random.default_rng(s).integers(2) == think_prompt)
  rng = np.random.default_rng(seed)
  return make_example(tiny.train_record(record), tiny.tokenizer(), data, tiny.IMAGE, rng)


def test_the_same_samples(samples: list[dict]):
  assert len(samples) == RECORDS
  for place, (record, got) in enumerate(zip(ORDER, samples, strict=True)):
    (masks,) = got["masks"]
    example = ours(record, place % 2, len(masks))
    assert got["input_ids"][0].tolist() == example.input_ids.tolist()
    assert got["labels"][0].tolist() == example.labels.tolist()
    pixel_values = normalize_patches(example.patches)
    np.testing.assert_array_equal(got["pixel_values"].numpy(), pixel_values)
    assert got["image_grid_thw"].tolist() == [list(example.grids[0])]
    grounding = got["g_pixel_values"][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(grounding, example.grounding_image)
    np.testing.assert_array_equal(masks.numpy(), example.masks)
    assert got["pixel_values"].dtype == torch.float32
    assert masks.any()


def test_another_record_differs(samples: list[dict]):
  example = ours(ORDER[1], 0, 3)
  assert (samples[0]["pixel_values"].numpy() != normalize_patches(example.patches)).any()
