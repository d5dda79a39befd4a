"""Starts `tests.train.run_tiny` or a command in processes and reads what a run left."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {f"{part}_seconds" for part in ("rollout", "reward", "update")}
TIMES = {"step_seconds", "tokens_per_second", "compiles", *PARTS}
LIMIT_S = 600
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
"""Variables of a process that has them."""
ENVIRONMENT = {
  **os.environ,
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
"""Programs run a few steps only: compiling them quickly counts more."""


def slow(*values: object) -> list:
  """Values of a parameter that only `-m slow` tries."""
  return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def start(
  records: Path, workdir: Path, variables: dict[str, str] | None = None, **options: object
) -> subprocess.Popen:
  """Starts a run; compiled programs are kept beside the records."""
  kept = {
    "JAX_COMPILATION_CACHE_DIR": str(records / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  }
  arguments = [str(records), str(workdir), json.dumps(options)]
  return start_module("tests.train.run_tiny", *arguments, variables=kept | (variables or {}))


def start_module(
  module: str, *arguments: str, variables: dict[str, str] | None = None
) -> subprocess.Popen:
  """Starts `python -m module`."""
  environment = {**ENVIRONMENT, **(variables or {})}
  return subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(records: Path, workdir: Path, **options: object) -> tuple[int, str, str]:
  """(exit status, standard output, standard error) of a run."""
  return finish(start(records, workdir, **options))


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Waits for a run."""
  out, err = process.communicate(timeout=LIMIT_S)
  return process.returncode, out, err


def found_by(module: str, file: Path) -> dict:
  """What `python -m module file` writes as JSON."""
  status, _, errors = finish(start_module(module, str(file)))
  assert status == 0, errors
  return json.loads(file.read_text())


def arrays_by(module: str, file: Path, *names: str) -> dict[str, dict[str, np.ndarray]]:
  """The arrays that `python -m module file names..` writes as `<run>/<what>`, by run."""
  status, _, errors = finish(start_module(module, str(file), *names))
  assert status == 0, errors
  found: dict[str, dict[str, np.ndarray]] = {}
  with np.load(file) as arrays:
    for name in arrays.files:
      run, _, what = name.partition("/")
      found.setdefault(run, {})[what] = arrays[name]
  return found


def run_together(
  count: int, records: Path, workdir: Path, last: dict | None = None, **options: object
) -> list[tuple[int, str, str]]:
  """A run in `count` processes that find each other on this machine; `last` is for the last one."""
  started = []
  for number, variables in enumerate(rendezvous(count)):
    own = options | (last or {}) if number == count - 1 else options
    started.append(start(records, workdir, variables, **own))
  return [finish(process) for process in started]


def rendezvous(count: int) -> list[dict[str, str]]:
  """Variables of `count` processes that find each other on this machine."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(number),
    }
    for number in range(count)
  ]


def logged(workdir: Path) -> list[dict]:
  """metrics.jsonl without the times."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def compiles(workdir: Path) -> list[int]:
  """How often the step had been compiled, at each logged step."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["compiles"] for line in lines]


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """All arrays of a checkpoint by name, read without knowing their shapes."""
  folder = (workdir / "checkpoints" / str(step) / "state").resolve()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(folder).item_metadata.tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=wanted))
  named = jax.tree_util.tree_flatten_with_path(found)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value)
    for path, value in named
  }
