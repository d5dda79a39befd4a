"""Many pictures with one command: folders, requests, what is bad, and what is there already."""

import json

import numpy as np
import pytest

from tests.pictures import encoded, picture
from tests.train import processes
from vrt_jax import predict as predict_command
from vrt_jax.config import MeshConfig
from vrt_jax.data.image import decode_image
from vrt_jax.data.trace import mentions
from vrt_jax.generate import predictor as predictor_module
from vrt_jax.generate.predictor import Prediction
from vrt_jax.predict import Args, items_of, predict


class Echo:
  """In the place of `Predictor`: answers with the question; the mask is the left half."""

  asked: tuple = ()

  def __init__(self, loaded, config, **settings):
    self.size = config.batch_size

  def predict(self, requests):
    assert len(requests) <= self.size
    for request in requests:
      Echo.asked += (request.question,)
      image = decode_image(request.image)
      mask = np.zeros((1, image.height, image.width), bool)
      mask[..., : image.width // 2] = True
      text = f"<answer>{request.question} (<vea><obj1> [SEG]</vea>)</answer>"
      yield Prediction(text, mentions(text), mask, [0.5], truncated=False)


@pytest.fixture
def echo(monkeypatch):
  monkeypatch.setattr(predictor_module, "Predictor", Echo)
  monkeypatch.setattr(Echo, "asked", ())
  return Echo


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "pictures"
  (path / "sub").mkdir(parents=True)
  for name, size in (("a.png", (40, 30)), ("b.png", (700, 500)), ("sub/a.PNG", (40, 30))):
    (path / name).write_bytes(encoded(picture(*size)))
  (path / "notes.txt").write_text("no picture")
  return path


def answers(out) -> dict[str, str]:
  return {
    path.parent.relative_to(out).as_posix(): json.loads(path.read_text())["text"]
    for path in out.rglob("prediction.json")
  }


def test_a_folder_is_answered_picture_by_picture(echo, folder, tmp_path):
  out = tmp_path / "out"
  predict(Args(image=folder, question="Where?", out=out, batch_size=2))
  assert set(answers(out)) == {"a.png", "b.png", "sub/a.PNG"}
  assert (out / "b.png" / "overlay.png").is_file()


def test_requests_have_their_own_questions(echo, folder, tmp_path):
  file = tmp_path / "requests.jsonl"
  lines = [{"image": f"pictures/{name}", "question": f"{name}?"} for name in ("b.png", "a.png")]
  file.write_text("\n\n".join(json.dumps(line) for line in lines))
  predict(Args(requests=file, out=tmp_path / "out"))
  found = {name: text.split("?")[0] for name, text in answers(tmp_path / "out").items()}
  assert found == {"00001-b": "<answer>b.png", "00003-a": "<answer>a.png"}


def test_a_bad_picture_stops_no_other(echo, folder, tmp_path, capsys):
  (folder / "bad.jpg").write_bytes(b"no picture")
  with pytest.raises(ValueError, match=r"1 of 4 pictures could not be used"):
    predict(Args(image=folder, question="Where?", out=tmp_path / "out"))
  assert len(answers(tmp_path / "out")) == 3
  lines = [line for line in capsys.readouterr().err.splitlines() if "bad.jpg" in line]
  assert len(lines) == 1 and "corrupt image" in lines[0]


def test_what_is_there_is_not_asked_again(echo, folder, tmp_path, monkeypatch, capsys):
  args = Args(image=folder, question="Where?", out=tmp_path / "out")
  real = predict_command.write_prediction
  written = []

  def stops(*given):
    if len(written) == 1:
      raise OSError("no space left")
    written.append(given)
    real(*given)

  with monkeypatch.context() as patch:
    patch.setattr(predict_command, "write_prediction", stops)
    with pytest.raises(OSError):
      predict(args)
  assert len(answers(args.out)) == 1
  monkeypatch.setattr(Echo, "asked", ())
  predict(args)
  assert len(echo.asked) == 2 and len(answers(args.out)) == 3
  predict(args)
  assert len(echo.asked) == 2 and "all 3 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "either --image or --requests"),
    ({"image": "a", "requests": "b"}, "either --image or --requests"),
    ({"image": "a", "question": "?"}, "--out is missing"),
    ({"image": "a", "out": "o"}, "--question is missing"),
    ({"image": "nowhere", "question": "?", "out": "o"}, "nowhere does not exist"),
    ({"image": "empty", "question": "?", "out": "o"}, "no picture in"),
  ],
)
def test_arguments(tmp_path, fields, message):
  (tmp_path / "empty").mkdir()
  paths = {k: tmp_path / v if k != "question" else v for k, v in fields.items()}
  with pytest.raises(ValueError, match=message):
    items_of(Args(**paths))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "line 1: not JSON"),
    ("[]", "line 1: needs the texts"),
    ('{"image": "a.png"}', "line 1: needs the texts"),
    ('{"image": 3, "question": "?"}', "line 1: needs the texts"),
    ("", "holds no requests"),
  ],
)
def test_malformed_requests(tmp_path, line, message):
  file = tmp_path / "requests.jsonl"
  file.write_text(line)
  with pytest.raises(ValueError, match=message):
    items_of(Args(requests=file, out=tmp_path))


def test_a_mesh_has_the_devices_that_there_are(echo, folder, tmp_path):
  with pytest.raises(ValueError, match="does not fit"):
    mesh = MeshConfig(data=3)
    predict(Args(image=folder, question="Where?", out=tmp_path / "out", mesh=mesh))
  assert not echo.asked


@pytest.mark.slow
@pytest.mark.parametrize(
  ("image", "mesh"),
  [("pictures", []), ("pictures/b.png", []), ("pictures/b.png", ["--mesh.tensor", "4"])],
)
def test_many_devices_give_the_same_answers(folder, tmp_path, image, mesh):
  words = ["--image", str(tmp_path / image), "--question", "Which key opens the lock?"]
  words += ["--max-new-tokens", "144", "--batch-size", "2"]
  for name, more, variables in (("one", [], None), ("four", mesh, processes.FOUR_DEVICES)):
    arguments = [*words, "--out", str(tmp_path / name), *more]
    run = processes.start_module("vrt_jax.predict", *arguments, variables=variables)
    status, _, errors = processes.finish(run)
    assert status == 0, errors
  files = sorted((tmp_path / "one").rglob("prediction.json"))
  assert len(files) == (3 if image == "pictures" else 1)
  for file in files:
    other = tmp_path / "four" / file.relative_to(tmp_path / "one")
    found, expected = (json.loads(path.read_text()) for path in (other, file))
    scores = [[o.pop("score") for o in answer["objects"]] for answer in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert found == expected and found["objects"]
