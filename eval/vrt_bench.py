"""VRT-Bench: generates and scores.

    python -m eval.vrt_bench --checkpoint DIR --data 'VRT-Eval/*.tfrecord' --out DIR [--no-thinking]

Writes `ver_evaluation_results.json`, `report.html` and overlay pictures, and prints R-LQ, R-SQ and
A-mIoU. Greedy decoding; without thinking every mask is an answer, as in the reference
(vrt_eval_single.py, VERLLMEvaluator). What is done is kept in `partial.jsonl`: after a kill the
same command goes on there and gives the same file. Each batch is divided over all devices, those
of several processes (`vrt_jax.runtime.start_processes`) too; one process writes. Machines that do
not know each other take a shard each (`--shard 0/3`); `python -m eval.merge` joins them.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from converters.checkpoints import find_model
from eval.report import write_report
from vrt_jax import cli
from vrt_jax.config import EvalConfig, MeshConfig
from vrt_jax.data.buckets import Bucket
from vrt_jax.data.records import EvalRecord
from vrt_jax.data.sources import eval_records
from vrt_jax.evaluate import evaluate, headline, short_hash
from vrt_jax.generate.batches import batch_order, batch_size_of, choose_buckets, coarse_bucket
from vrt_jax.generate.predictor import Predictor, Request
from vrt_jax.model_directory import Loaded, load
from vrt_jax.partial import Partial
from vrt_jax.runtime import is_leader, mesh_of_several, say, start_processes

PARTIAL_FILE = "partial.jsonl"
"""In OUT, while it is not finished."""


@dataclass(frozen=True)
class Args:
  """Generates and scores VRT-Eval records."""

  data: str
  """Path or glob of the VRT-Eval TFRecord files, or the folder of a prepared set."""
  out: Path
  """Folder for the results file, the report and the pictures."""
  checkpoint: str = "shapes"
  """Model directory, a training's workdir, or a Hugging Face folder or id, which is converted into
  OUT/model; the shipped shapes model where left out."""
  no_thinking: bool = False
  """Ask for the answers without a reasoning trace; every mask is an answer."""
  max_new_tokens: int = 2048
  max_masks: int = 64
  """[SEG] a text whose masks are kept."""
  batch_size: int = 1
  """Rounded up to a multiple of the devices that `mesh` divides a batch over."""
  num_samples: int = 0
  """Records that are scored, from the first; 0 for all."""
  shard: str = "0/1"
  """I/N: every N-th record from the I-th (from 0) on."""
  pictures: int = 20
  """Overlays of the first samples; the report shows all."""
  mesh: MeshConfig = field(default_factory=MeshConfig)
  """mesh.tensor divides a large model; without it every device has all of it."""


def prompt_sizes(loaded: Loaded, records: Sequence[EvalRecord], thinking: bool) -> list[Bucket]:
  """Rounded (tokens, patches) of every prompt.

  Raises:
    ValueError: names the sample whose picture or question cannot be used.
  """
  sizes = []
  for record in tqdm(records, desc="prompts", unit="sample", disable=not is_leader()):
    try:
      sizes.append(coarse_bucket(loaded, Request(record.image, record.question), thinking))
    except ValueError as error:
      raise ValueError(f"sample {record.key}: {error}") from error
  return sizes


def bench(args: Args) -> dict[str, Any]:
  """Generates, scores and writes; returns the content of the results file.

  Raises:
    ValueError: the model directory, the data or a record cannot be used.
  """
  thinking = not args.no_thinking
  index, count = shard_of(args.shard)
  mesh = mesh_of_several(args.mesh)
  records = eval_records(args.data, args.num_samples)
  loaded = load(find_model(args.checkpoint, args.out), mesh=mesh)
  sizes = prompt_sizes(loaded, records, thinking)
  config = EvalConfig(
    batch_size=batch_size_of(args.batch_size, len(records), mesh),
    max_new_tokens=args.max_new_tokens,
    max_masks=args.max_masks,
    prompt_buckets=choose_buckets(sizes),
    num_samples=args.num_samples,
    num_pictures=args.pictures,
  )
  records, sizes = records[index::count], sizes[index::count]
  config_hash = settings_hash(loaded, config, thinking)
  settings = [args.checkpoint, config_hash, short_hash([record.key for record in records])]
  partial = Partial(args.out / PARTIAL_FILE, settings)
  results = evaluate(
    Predictor(loaded, config, thinking=thinking, mesh=mesh),
    records,
    args.out,
    config,
    thinking=thinking,
    order=batch_order(sizes),
    config_hash=config_hash,
    model_path=args.checkpoint,
    description="generate",
    partial=partial,
  )
  if is_leader():
    images = {record.key: record.image for record in records}
    write_report(results, args.out, images)
  partial.remove()
  return results


def shard_of(text: str) -> tuple[int, int]:
  """(I, N) of "I/N"; ValueError unless 0 <= I < N."""
  index, _, count = text.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise ValueError(f'--shard is "{text}", not of the form I/N with 0 <= I < N')
  return int(index), int(count)


def settings_hash(loaded: Loaded, config: EvalConfig, thinking: bool) -> str:
  """Short hash of the model's configuration, its preprocessing and the evaluation's settings."""
  return short_hash([asdict(loaded.model.config), asdict(loaded.image), asdict(config), thinking])


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m eval.vrt_bench", __doc__)
  start_processes()
  results = bench(args)
  say(f"{headline(results)}  ({results['total_samples']} samples)")
  say(f"written to {args.out}")


def command() -> None:
  """The installed command: `main` with errors as one line."""
  cli.run(main)


if __name__ == "__main__":
  command()
