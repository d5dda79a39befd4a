"""The SFT step beside PyTorch's: LoRA, frozen tower and encoder, five masks, float32.

    python -m scripts.bench sft_step [--repeats 3]
    python -m scripts.bench_sft jax     # the peak memory of one side by itself

Speed is measured in turns in one process, memory in a process a side.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.bench_model import MODEL, Subject, with_lora
from scripts.bench_runs import medians
from scripts.bench_speed import SpeedArgs, compared
from vrt_jax.config import MeshConfig, OptimConfig, SftLossConfig

if TYPE_CHECKING:  # JAX is loaded after --help
  from jax import Array
  from jax.stages import Compiled

  from vrt_jax.types import Batch

RANK = 128
TEXT_TOKENS = 160
OPTIM = OptimConfig(
  learning_rate=4e-5, betas=(0.9, 0.999), batch_size=1, steps=100, trainable="adapters"
)
LOSS = SftLossConfig()


def subject() -> Subject:
  """The model of middle size with adapters; 256 visual tokens."""
  return Subject(with_lora(MODEL, RANK), text_tokens=TEXT_TOKENS)


def training_batch(of: Subject, rows: int = 1, masks: int = 5) -> "Batch":
  """Equal samples: half of the text is labelled and holds the [SEG]s, with blocks as masks."""
  from vrt_jax.types import IGNORE_INDEX, Batch, Targets, on_host

  prompt = of.prompt()
  inputs = of.inputs(prompt, rows)
  length, labelled = len(prompt.input_ids), of.text_tokens // 2
  places = np.linspace(length - labelled, length - 2, masks).astype(np.int32)
  labels = np.full(length, IGNORE_INDEX, np.int32)
  labels[-labelled:] = prompt.input_ids[-labelled:]
  side = of.config.sam2.mask_size
  truth = np.zeros((masks, side, side), np.uint8)
  for i in range(masks):
    top = i % 7 * side // 8
    truth[i, top : top + side // 4, side // 4 : side // 2] = 1

  def repeated(x: np.ndarray) -> "Array":
    return on_host(np.repeat(x[None], rows, axis=0))

  targets = Targets(
    labels=repeated(labels),
    seg_positions=repeated(places),
    seg_valid=repeated(np.ones(masks, bool)),
    masks=repeated(truth),
  )
  return Batch(inputs.vision, inputs.text, inputs.grounding_image, targets)


def prepared_step(of: Subject, batch: "Batch") -> tuple["Compiled", Callable[[], float]]:
  """(the compiled step, a function that makes an update and gives its loss)."""
  import jax

  from vrt_jax.runtime import make_mesh
  from vrt_jax.train.optim import make_optimizer, trainable_filter
  from vrt_jax.train.sft_step import make_sft_step
  from vrt_jax.train.state import create_state
  from vrt_jax.train.step_clock import compile_step

  mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(OPTIM)
  state, frozen = create_state(of.model, optimizer, trainable_filter(OPTIM.trainable), mesh)
  del of.__dict__["model"]  # the state has its own copy
  batch, key = jax.device_put(batch), jax.random.key(0)
  step = compile_step(make_sft_step(optimizer, OPTIM, LOSS, state), state, frozen, batch, key)
  held = [state]

  def run() -> float:
    held[0], metrics = step(held[0], frozen, batch, key)
    return float(metrics["loss"])

  return step, run


def our_step(of: Subject) -> Callable[[], float]:
  """A function that makes an update and gives its loss."""
  return prepared_step(of, training_batch(of))[1]


def torch_step(of: Subject) -> Callable[[], float]:
  """The same in PyTorch, from weights of its own."""
  from converters.torch_sft import TorchSft
  from converters.torch_twin import untrained

  side = TorchSft(untrained(of.config, of.tokenizer), of.config.lora, OPTIM, LOSS)
  batch = training_batch(of)
  return lambda: side.step(batch)


STEPS = {"jax": our_step, "torch": torch_step}


def measure_sft(args: SpeedArgs) -> dict:
  """The line of results, with each side's peak memory in GiB."""
  peaks = {side: _peak_of(side) for side in STEPS}
  runs: dict[str, Callable[[], object]] = {s: make(subject()) for s, make in STEPS.items()}
  line = compared(runs, args.repeats)
  return {"name": "sft_step"} | line | {f"{side}_gib": peak for side, peak in peaks.items()}


def _peak_of(side: str) -> float:
  command = [sys.executable, "-m", "scripts.bench_sft", side]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])["gib"]


def main() -> None:
  """Command line: makes two steps of a side and prints the peak of its resident memory."""
  side = sys.argv[1] if len(sys.argv) > 1 else ""
  if side not in STEPS:
    raise SystemExit(f"error: give a side: {' or '.join(STEPS)}")
  medians({side: STEPS[side](subject())}, 2)
  # getrusage would count the process that started this one
  (kib,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
  print(json.dumps({"gib": round(int(kib) / 2**20, 2)}))


if __name__ == "__main__":
  main()
