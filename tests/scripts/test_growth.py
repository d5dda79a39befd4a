"""The command that measures how a training step grows."""

from pathlib import Path

import pytest
from PIL import Image

from scripts import growth
from scripts.bench_model import with_lora
from scripts.growth import Point, exponent
from tests.scripts.test_bench import SMALL


def test_exponents_are_those_of_powers():
  points = [Point(x, 3.0 * x, 0.5 * x**2) for x in (1, 2, 8)]
  assert exponent(points, "seconds") == 1.0
  assert exponent(points, "mib") == 2.0


@pytest.mark.slow
def test_more_of_a_picture_takes_more_memory(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(growth, "PICTURE", SMALL.picture_size)
  config = with_lora(SMALL.config, 4)
  small, large = (growth.measure("picture_px", x, 1, config) for x in (192, 384))
  assert small.seconds > 0
  assert 1.5 * small.mib < large.mib


def test_the_picture_has_a_column_a_sweep(tmp_path: Path):
  sweeps = {
    name: [Point(x, float(x), 2.0 * x) for x in values] for name, values in growth.SWEEPS.items()
  }
  growth.draw(tmp_path / "growth.png", sweeps)
  with Image.open(tmp_path / "growth.png") as picture:
    assert picture.width > 3 * picture.height / 2
    assert len(set(picture.convert("L").tobytes())) > 20
