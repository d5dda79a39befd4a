"""python -m vrt_jax.predict: pictures and questions -> prediction.json and overlay.png.

python -m vrt_jax.predict --image photo.jpg --question "Which key opens the lock?" --out out
python -m vrt_jax.predict --image folder/ --question "Where is the exit?" --out out
python -m vrt_jax.predict --requests requests.jsonl --out out
python -m vrt_jax.predict --serve

A line of requests.jsonl is {"image": path, "question": text}, the path from the file's folder. Of
several pictures each has its own folder in --out; what is there already is not asked again.
All devices of a machine share a batch of them (--batch-size 8); --mesh.tensor 4 divides a model
that is too large for one device.
"""

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vrt_jax import cli
from vrt_jax.config import MeshConfig
from vrt_jax.files import write_whole

if TYPE_CHECKING:  # JAX is loaded after --help
  from jax.sharding import Mesh

  from vrt_jax.generate.predictor import Prediction, Predictor, Request

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PREDICTION_FILE = "prediction.json"


@dataclass(frozen=True)
class Args:
  """Answers questions about pictures with reasoning traces and masks."""

  image: Path | None = None
  """Picture file, or a folder whose pictures are all asked the question."""
  question: str = ""
  requests: Path | None = None
  """JSON lines {"image", "question"}, instead of --image and --question."""
  out: Path | None = None
  """Folder for prediction.json and overlay.png; of several pictures, for a folder each."""
  checkpoint: str = "shapes"
  """Model directory; the shipped shapes model where left out."""
  no_thinking: bool = False
  """Ask for the answer without a reasoning trace."""
  max_new_tokens: int = 2048
  max_masks: int = 64
  batch_size: int = 1
  """Of several pictures, rounded up to a multiple of the devices that share a batch."""
  mesh: MeshConfig = field(default_factory=MeshConfig)
  """Devices for several pictures; a single one takes one device, unless mesh.tensor is given."""
  temperature: float = 0.0
  """0 is greedy."""
  top_p: float = 1.0
  seed: int = 0
  serve: bool = False
  """Start a web page on this machine, to upload pictures and ask about them."""
  host: str = "127.0.0.1"
  """Address of the page; others than this machine reach it only where you name another one."""
  port: int = 8000


@dataclass(frozen=True)
class Item:
  """One question to answer: the name of its folder, and what is asked."""

  name: str
  image: Path
  question: str


def items_of(args: Args) -> list[Item]:
  """The questions that the arguments name, in order.

  Raises:
    ValueError: the arguments or a line of the requests are wrong, or there is no picture.
  """
  image = args.image
  if (image is None) == (args.requests is None):
    raise ValueError("give either --image or --requests (or --serve)")
  if args.out is None:
    raise ValueError("--out is missing: the folder for the results")
  if image is None:
    assert args.requests is not None
    return read_requests(args.requests)
  if not args.question.strip():
    raise ValueError("--question is missing")
  if image.is_dir():
    files = sorted(p for p in image.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
      raise ValueError(f"no picture in {image} ({', '.join(PICTURE_SUFFIXES)})")
    return [Item(p.relative_to(image).as_posix(), p, args.question) for p in files]
  if not image.is_file():
    raise ValueError(f"image {image} does not exist")
  return [Item("", image, args.question)]


def read_requests(path: Path) -> list[Item]:
  """The items of a file of JSON lines; ValueError that names the line for anything malformed."""
  items = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
    found = entry if isinstance(entry, dict) else {}
    texts = [x for k in ("image", "question") if isinstance(x := found.get(k), str) and x.strip()]
    if len(texts) != 2:
      raise ValueError(f'{path}, line {number}: needs the texts "image" and "question"')
    image = path.parent / texts[0]
    items.append(Item(f"{number:05d}-{image.stem}", image, texts[1]))
  if not items:
    raise ValueError(f"{path} holds no requests")
  return items


def mesh_of(args: Args, many: bool) -> "Mesh | None":
  """The devices that share the work, None for one.

  Raises:
    ValueError: the mesh does not fit the devices.
  """
  from vrt_jax.runtime import mesh_of_several

  mesh = mesh_of_several(args.mesh)
  return mesh if mesh and (many or mesh.shape["tensor"] > 1) else None


def predict(args: Args) -> None:
  """Answers every question and writes its files.

  Raises:
    ValueError: the arguments or the model directory are wrong, or pictures could not be used; all
      others are answered first.
  """
  from tqdm import tqdm

  from vrt_jax import model_directory
  from vrt_jax.config import EvalConfig
  from vrt_jax.generate.batches import (
    batch_order,
    batch_size_of,
    choose_buckets,
    coarse_bucket,
  )
  from vrt_jax.generate.predictor import Predictor, Request, prompt_bucket
  from vrt_jax.generate.sampling import Sampling

  items, out = items_of(args), args.out
  assert out is not None
  many = items[0].name != ""
  todo = [i for i in items if not many or not (out / i.name / PREDICTION_FILE).is_file()]
  if not todo:
    print(f"all {len(items)} answers are in {out} already")
    return
  mesh = mesh_of(args, many)
  loaded = model_directory.load(args.checkpoint, mesh=mesh)
  thinking, failures, sized = not args.no_thinking, [], []
  for item in tqdm(todo, desc="prompts", unit="picture", disable=not many):
    try:
      request = Request(item.image.read_bytes(), item.question)
      find = coarse_bucket if many else prompt_bucket
      sized.append((find(loaded, request, thinking), item))
    except (OSError, ValueError) as error:
      failures.append(f"{item.image}: {' '.join(str(error).split())}")
  if failures and not many:
    raise ValueError(failures[0])
  for failure in failures:
    print(failure, file=sys.stderr)
  if sized:
    sizes = [size for size, _ in sized]
    config = EvalConfig(
      batch_size=batch_size_of(max(1, args.batch_size), len(sized), mesh),
      max_new_tokens=args.max_new_tokens,
      max_masks=args.max_masks,
      prompt_buckets=choose_buckets(sizes),
    )
    predictor = Predictor(
      loaded,
      config,
      thinking=thinking,
      sampling=Sampling(args.temperature, args.top_p),
      seed=args.seed,
      mesh=mesh,
    )
    answer(predictor, [sized[i][1] for i in batch_order(sizes)], out, config.batch_size, many)
  if failures:
    raise ValueError(f"{len(failures)} of {len(items)} pictures could not be used (named above)")


def answer(
  predictor: "Predictor", items: Sequence[Item], out: Path, batch_size: int, many: bool
) -> None:
  """Predicts batch by batch and writes each answer as soon as it is there."""
  from tqdm import tqdm

  from vrt_jax.generate.predictor import Request

  with tqdm(total=len(items), desc="answers", unit="picture", disable=not many) as bar:
    for start in range(0, len(items), batch_size):
      batch = items[start : start + batch_size]
      requests = [Request(item.image.read_bytes(), item.question) for item in batch]
      for item, request, found in zip(batch, requests, predictor.predict(requests), strict=True):
        folder = out / item.name
        write_prediction(folder, request, found)
        bar.update()
        if not many:
          print(found.text)
          print(f"{len(found.masks)} masks: {folder / PREDICTION_FILE}, {folder / 'overlay.png'}")


def write_prediction(folder: Path, request: "Request", prediction: "Prediction") -> None:
  """overlay.png, then prediction.json, which is there whole or not at all."""
  from PIL import Image

  from vrt_jax.draw import draw_overlay

  folder.mkdir(parents=True, exist_ok=True)
  objects = [
    {k: v for k, v in dataclasses.asdict(o).items() if k != "object_number"}
    for o in prediction.objects()
  ]
  picture = Image.open(io.BytesIO(request.image)).convert("RGB")
  overlay = draw_overlay(
    picture, request.question, prediction.text, prediction.mentions, prediction.masks
  )
  overlay.save(folder / "overlay.png")
  document = {"text": prediction.text, "objects": objects}
  write_whole(folder / PREDICTION_FILE, json.dumps(document, indent=2, ensure_ascii=False))


def main() -> None:
  """Command line."""
  args = cli.parse(Args, sys.argv[1:], "python -m vrt_jax.predict", __doc__)
  if not args.serve:
    predict(args)
    return
  from vrt_jax.serve import ServeSettings, serve

  settings = ServeSettings(args.host, args.port, args.max_new_tokens, args.max_masks)
  serve(args.checkpoint, settings)


def command() -> None:
  """The installed command: `main` with errors as one line."""
  cli.run(main)


if __name__ == "__main__":
  command()
