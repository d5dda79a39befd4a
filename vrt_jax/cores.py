"""How many CPU cores there are to use; needs no JAX, so that data workers can ask."""

import os


def usable_cores() -> int:
  """Cores that this process may use, at least 1; taskset and Slurm give some of the machine's."""
  allowed = getattr(os, "sched_getaffinity", None)  # on Linux alone
  return len(allowed(0)) if allowed else os.cpu_count() or 1
