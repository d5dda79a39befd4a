"""Published peaks of TPUs and GPUs."""

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
  cores: int
  clock: float
  """Cycles a second at which the matrix units have the published peak."""

  @property
  def vector_ops_per_second(self) -> float:
    """Elementwise: 8 x 128 lanes a core, four operations a lane and cycle."""
    return self.cores * 8 * 128 * 4 * self.clock


CHIPS = {
  "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 1, 1.5e9),
  "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 2, 1.75e9),
  "v6e": Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9, 1, 1.75e9),
}

PEAKS = {
  "TPU v5 lite": CHIPS["v5e"].peak_flops,
  "TPU v5": CHIPS["v5p"].peak_flops,
  "TPU v6 lite": CHIPS["v6e"].peak_flops,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}
"""bfloat16 FLOP/s by the start of a JAX device's kind; of GPUs NVIDIA's figures (SXM, dense)."""


def peak_of(device_kind: str) -> float | None:
  """The published bfloat16 FLOP/s of a device, None where it is not known here."""
  names = [name for name in PEAKS if device_kind.startswith(name)]
  return PEAKS[max(names, key=len)] if names else None


def chip_of(topology: str) -> Chip:
  """The chip of a topology name such as v5e:4x4.

  Raises:
    ValueError: it is none of the chips known here.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    raise ValueError(f"--topology {topology}: the chip is none of {', '.join(CHIPS)}")
  return CHIPS[name]
