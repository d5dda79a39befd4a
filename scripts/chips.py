"""TPU chips: published peaks, and what a program's operations take by them."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """Figures of Google Cloud's TPU pages (cloud.google.com/tpu/docs/system-architecture)."""

  name: str
  peak_flops: float
  """bfloat16, a second."""
  hbm_bytes: float
  hbm_bytes_per_second: float
  ici_bytes_per_second: float
  """Between chips of a slice, all links of a chip together, one direction."""


CHIPS = {
  "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
  "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
  "v6e": Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9),
}


def chip_of(topology: str) -> Chip:
  """The chip of a topology name such as v5e:4x4.

  Raises:
    ValueError: it is none of the chips known here.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    raise ValueError(f"--topology {topology}: the chip is none of {', '.join(CHIPS)}")
  return CHIPS[name]
