"""Scores on the held-out records: of the base model, during training, and of the trained model."""

import dataclasses
import json
from pathlib import Path

import jax

from vrt_jax import evaluate
from vrt_jax.config import TrainConfig
from vrt_jax.data.records import EvalRecord
from vrt_jax.data.sources import eval_records
from vrt_jax.generate.predictor import Predictor
from vrt_jax.metrics.results import RESULTS_FILE
from vrt_jax.model_directory import Loaded
from vrt_jax.models.lora import merge_lora
from vrt_jax.runtime import say, with_tensor
from vrt_jax.train.state import Frozen, TrainState


class HeldOut:
  """The held-out records of a run and the folder `eval/` of its workdir.

  Every process predicts all records together with the others, batch by batch over the mesh, and
  computes the same scores; the leader writes them.
  """

  def __init__(
    self,
    config: TrainConfig,
    records: list[EvalRecord],
    workdir: Path,
    loaded: Loaded,
    mesh: jax.sharding.Mesh,
  ):
    """`config` has the resolved model; `loaded` gives tokenizer and image settings."""
    self._config, self._records = config, records
    self._mesh = with_tensor(mesh, config.eval.tensor, "eval.tensor")
    self._folder, self._loaded = workdir / "eval", loaded

  def due(self, step: int) -> bool:
    """Whether the state after `step` is scored during training."""
    every = self._config.eval_every
    return every > 0 and (step % every == 0 or step == self._config.optim.steps)

  def metrics(self, step: int, state: TrainState, frozen: Frozen) -> dict[str, float]:
    """`metrics` of the results file for the model of this step, LoRA merged."""
    name = "final" if step == self._config.optim.steps else f"step_{step}"
    results = self.score(self.model(state, frozen), name, f"step {step}")
    assert results is not None  # `check_batch` has seen that there are records
    return results["metrics"]

  def model(self, state: TrainState, frozen: Frozen) -> Loaded:
    """The model of a state, LoRA merged."""
    merged = merge_lora(frozen.merge(state.trainable))
    return dataclasses.replace(self._loaded, model=merged)

  def score(self, loaded: Loaded, folder: str, name: str, reuse: bool = False) -> dict | None:
    """Scores a model and prints the headline; None without held-out records.

    With `reuse`, results that `eval/<folder>` already has are read instead.
    """
    if not self._records:
      return None
    config, out_dir = self._config, self._folder / folder
    results_file = out_dir / RESULTS_FILE
    if reuse and results_file.is_file():
      results = json.loads(results_file.read_text())
    else:
      predictor = Predictor(
        loaded,
        config.eval,
        thinking=config.data.thinking,
        blind=config.data.blind,
        mesh=self._mesh,
      )
      results = evaluate.evaluate(
        predictor,
        self._records,
        out_dir,
        config.eval,
        thinking=config.data.thinking,
        config_hash=config_hash(config),
        description=name,
      )
    say(f"{name}: {evaluate.headline(results)}  ({len(self._records)} held-out samples)")
    return results


def held_out_records(config: TrainConfig, pattern: str) -> list[EvalRecord]:
  """The first eval.num_samples records (0: all); none without a pattern."""
  return eval_records(pattern, config.eval.num_samples) if pattern else []


def config_hash(config: TrainConfig) -> str:
  """Short hash of a resolved configuration."""
  return evaluate.short_hash(dataclasses.asdict(config))
