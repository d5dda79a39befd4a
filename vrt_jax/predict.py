"""python -m vrt_jax.predict: one picture and one question -> prediction.json and overlay.png.

python -m vrt_jax.predict --image photo.jpg --question "Which key opens the lock?" --out out
"""

import dataclasses
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from vrt_jax import cli


@dataclass(frozen=True)
class Args:
  """Answers a question about a picture with a reasoning trace and masks."""

  image: Path
  """Picture file."""
  question: str
  out: Path
  """Folder for prediction.json and overlay.png."""
  checkpoint: str = "shapes"
  """Model directory; the shipped shapes model where left out."""
  no_thinking: bool = False
  """Ask for the answer without a reasoning trace."""
  max_new_tokens: int = 2048
  max_masks: int = 64
  temperature: float = 0.0
  """0 is greedy."""
  top_p: float = 1.0
  seed: int = 0


def predict(args: Args) -> None:
  """Runs the model and writes both files.

  Raises:
    ValueError: the picture or the model directory cannot be read.
  """
  from PIL import Image

  from vrt_jax import model_directory
  from vrt_jax.config import EvalConfig
  from vrt_jax.draw import draw_overlay
  from vrt_jax.generate.predictor import Predictor, Request, prompt_bucket
  from vrt_jax.generate.sampling import Sampling

  if not args.image.is_file():
    raise ValueError(f"image {args.image} does not exist")
  loaded = model_directory.load(args.checkpoint)
  request = Request(args.image.read_bytes(), args.question)
  config = EvalConfig(
    batch_size=1,
    max_new_tokens=args.max_new_tokens,
    max_masks=args.max_masks,
    prompt_buckets=(prompt_bucket(loaded, request, thinking=not args.no_thinking),),
  )
  predictor = Predictor(
    loaded,
    config,
    thinking=not args.no_thinking,
    sampling=Sampling(args.temperature, args.top_p),
    seed=args.seed,
  )
  (prediction,) = predictor.predict([request])
  args.out.mkdir(parents=True, exist_ok=True)
  objects = [
    {k: v for k, v in dataclasses.asdict(o).items() if k != "object_number"}
    for o in prediction.objects()
  ]
  document = {"text": prediction.text, "objects": objects}
  (args.out / "prediction.json").write_text(json.dumps(document, indent=2, ensure_ascii=False))
  picture = Image.open(io.BytesIO(request.image)).convert("RGB")
  overlay = draw_overlay(
    picture, args.question, prediction.text, prediction.mentions, prediction.masks
  )
  overlay.save(args.out / "overlay.png")
  print(prediction.text)
  print(f"{len(objects)} masks: {args.out / 'prediction.json'}, {args.out / 'overlay.png'}")


if __name__ == "__main__":
  cli.run(lambda: predict(cli.parse(Args, sys.argv[1:], "python -m vrt_jax.predict")))
