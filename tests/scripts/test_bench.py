"""The command that measures speed beside PyTorch."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from converters.torch_sft import TorchSft
from converters.torch_twin import torch_twin
from scripts import (
  bench,
  bench_data,
  bench_metrics,
  bench_rollout,
  bench_sft,
  bench_speed,
  photo_records,
)
from scripts.bench_model import Subject, with_lora
from tests import tiny
from vrt_jax.config import SftLossConfig
from vrt_jax.data.transforms import segmentation_of, small_object_mask


def test_names_and_options_are_checked(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("sys.argv", ["bench", "speed"])
  with pytest.raises(
    ValueError, match="unknown measurement 'speed': choose from predict_reference"
  ):
    bench.main()
  monkeypatch.setattr("sys.argv", ["bench", "data_pipeline", "--color", "red"])
  with pytest.raises(ValueError, match="--color"):
    bench.main()


def test_both_sides_are_measured(tmp_path: Path):
  path = tiny.write_train(tmp_path / "train.tfrecord", [tiny.train_record(i) for i in range(3)])
  args = bench_data.DataArgs(batch_size=1, batches=2, repeats=1)
  speeds = bench_data.compare(args, path, workers=0)
  assert set(speeds) == {"jax", "torch", "ratio"}
  assert min(speeds.values()) > 0
  assert speeds["ratio"] == pytest.approx(speeds["jax"] / speeds["torch"], rel=0.05)


SMALL = Subject(
  replace(
    bench_speed.LANGUAGE,
    vision=replace(
      bench_speed.LANGUAGE.vision,
      depth=2,
      hidden_size=32,
      num_heads=2,
      intermediate_size=48,
      num_position_embeddings=36,
      out_hidden_size=48,
      deepstack_indexes=(0,),
    ),
    text=replace(tiny.MODEL.text, hidden_size=48, vocab_size=700),
  ),
  (96, 128),
  40,
)
ONCE = bench_speed.SpeedArgs(repeats=1, new_tokens=5)


def test_both_sides_of_the_rollout_have_the_same_weights_and_prompt():
  """Greedy, so that they must say the same."""
  args = bench_rollout.RolloutArgs(group_size=2, new_tokens=6, temperature=0.0, repeats=1)
  group, single, theirs = (run() for run in bench_rollout.sides(args, SMALL))
  assert group.shape == theirs.shape == (2, 6)
  np.testing.assert_array_equal(group, theirs)
  np.testing.assert_array_equal(single, group[:1])
  line = bench_rollout.measure_rollout(args, SMALL)
  assert min(line["ratio"], line["group_over_single"]) > 0 and line["prompt_tokens"] == 12 + 40


def test_both_sides_compute_the_same():
  """Every line says how far the sides are apart."""
  line = bench_speed.prefill(ONCE, SMALL)
  assert line["error"] < 1e-4 and line["tokens"] == 12 + 40 and line["gemm_gflops"] > 0
  assert 0 <= line["of_gemm_limit"] < 1  # rounded: so small a model may be below a hundredth
  assert bench_speed.predict(ONCE, SMALL, encode_once=False)["pixels_that_differ"] < 1e-3


@pytest.mark.slow
def test_every_stage_computes_the_same():
  for rows in (1, 2):
    assert bench_speed.decode(ONCE, SMALL, rows)["same_text"]
  enough = bench_speed.SpeedArgs(repeats=3, new_tokens=160)  # for a difference above the noise
  assert bench_speed.decode(enough, SMALL, 1, "bfloat16")["ratio"] > 0
  assert bench_speed.sam2_encode(ONCE, SMALL)["error"] < 1e-4
  line = bench_speed.mask_decode(ONCE, SMALL, 3)
  assert line["objects"] == 3 and line["error"] < 1e-3 and line["ratio"] > 0
  assert bench_speed.predict(ONCE, SMALL, encode_once=True)["pixels_that_differ"] < 1e-3


def test_the_sft_steps_have_one_loss(monkeypatch: pytest.MonkeyPatch):
  """Without the masks' terms, whose points are drawn; the adapters start at no effect."""
  small = Subject(with_lora(SMALL.config, 4), (96, 128), 40)
  monkeypatch.setattr(bench_sft, "LOSS", SftLossConfig(1.0, 0.0, 0.0, num_points=50))
  zeroed = small.model
  for path, variable in nnx.to_flat_state(nnx.state(zeroed, nnx.LoRAParam)):
    variable.set_value(variable.get_value() * (path[-1] == "lora_a"))
  theirs = TorchSft(
    torch_twin(zeroed, small.tokenizer), small.config.lora, bench_sft.OPTIM, bench_sft.LOSS
  )
  batch = bench_sft.training_batch(small)
  ours = bench_sft.our_step(small)
  first = ours(), theirs.step(batch)
  assert first[0] == pytest.approx(first[1], rel=1e-5)
  assert [ours(), theirs.step(batch)] != list(first)


def test_another_model_is_seen_to_differ(monkeypatch: pytest.MonkeyPatch):
  other = Subject(SMALL.config, (96, 128), 40)
  other.model.qwen.visual.merger.norm.bias[...] += 1.0
  monkeypatch.setattr(bench_speed, "torch_side", lambda _: real(other))
  assert bench_speed.prefill(ONCE, SMALL)["error"] > 1e-2


real = bench_speed.torch_side


def test_rles_are_measured_beside_dense_masks():
  line = bench_metrics.measure_metrics(bench_metrics.MetricsArgs(600, 900, 8, 6, repeats=3))
  assert line["masks"] == [8, 6] and line["ratio"] > 1


@pytest.mark.slow
def test_the_whole_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  argv = ["bench", "data_pipeline", "--repeats", "1", "--batches", "2"]
  monkeypatch.setattr("sys.argv", argv)
  bench.main()
  line = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert line["name"] == "data_pipeline"
  assert line["ratio"] > 1
  assert line["worker_ratio"] > 1


def test_photo_like_records():
  record = photo_records.photo_record(0)
  picture = Image.open(io.BytesIO(record.image))
  assert picture.size == (2250, 1500)
  assert 500_000 < len(record.image) < 3_000_000  # a photograph of this size has about 1 MB
  objects = record.annotation["original_annotation"]["objects_anns"]
  size = (picture.height, picture.width)
  shares = [
    small_object_mask(segmentation_of(objects, tag), size, tag, (256, 256), "nearest").mean()
    for tag in objects
  ]
  assert len(shares) == 6
  assert all(0.02 < share < 0.25 for share in shares)
  assert len(np.unique(shares)) == 6
