"""The log of answers: resumed, cut off, held, refused."""

import json

import pytest

from eval.api.responses import Response, ResponseLog, write_whole

SETTINGS = {"model": "m", "prompt": "p"}
FIRST = Response("a", "which?", "text\nß \u2028", (40, 60), "stop", "fake-1", 10, 2, 0.5)
FAILED = Response("b", "which?", error="HTTP 500")


def filled(folder) -> None:
  with ResponseLog(folder, SETTINGS) as log:
    log.append(FIRST)
    log.append(FAILED)


def test_lines_come_back(tmp_path):
  filled(tmp_path / "new" / "folder")
  with ResponseLog(tmp_path / "new" / "folder", SETTINGS) as log:
    assert log.responses == {"a": FIRST, "b": FAILED}
    assert log.answered("a") and not log.answered("b") and not log.answered("c")


def test_a_line_is_on_the_disk_at_once(tmp_path, monkeypatch):
  synced = []
  with ResponseLog(tmp_path, SETTINGS) as log:
    monkeypatch.setattr("os.fsync", lambda file: synced.append(log.path.read_bytes()))
    log.append(FIRST)
  assert len(synced) == 1 and json.loads(synced[0])["key"] == "a"


@pytest.mark.parametrize("rest", [b'{"key": "c", "quest', b"\x00\x00\x00", b'{"key": "c"}'])
def test_a_cut_line_is_dropped(tmp_path, rest):
  filled(tmp_path)
  path = tmp_path / "responses.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole + rest)
  with ResponseLog(tmp_path, SETTINGS) as log:
    assert list(log.responses) == ["a", "b"]
    log.append(Response("c", "which?", "new"))
  assert path.read_bytes().startswith(whole + b'{"key": "c", "question": "which?", "text": "new"')
  with ResponseLog(tmp_path, SETTINGS) as log:
    assert list(log.responses) == ["a", "b", "c"]


def test_an_answer_replaces_an_error_and_stays(tmp_path):
  filled(tmp_path)
  answer = Response("b", "which?", "text")
  with ResponseLog(tmp_path, SETTINGS) as log:
    log.append(answer)
    log.append(FAILED)
    assert log.responses["b"] == answer
  with ResponseLog(tmp_path, SETTINGS) as log:
    assert log.responses["b"] == answer


@pytest.mark.parametrize("line", [b"{", b"[1]", b"3", b'{"key": "c"}', b'{"x": 1}', b"\xff"])
def test_damage_elsewhere_is_named(tmp_path, line):
  filled(tmp_path)
  path = tmp_path / "responses.jsonl"
  path.write_bytes(line + b"\n" + path.read_bytes())
  with pytest.raises(ValueError, match=r"responses\.jsonl, line 1 is damaged") as error:
    ResponseLog(tmp_path, SETTINGS).__enter__()
  assert "\n" not in str(error.value)


def test_other_settings_are_refused(tmp_path):
  filled(tmp_path)
  with pytest.raises(ValueError, match=r'another prompt \("p", now "q"\): give another --out'):
    ResponseLog(tmp_path, SETTINGS | {"prompt": "q"}).__enter__()
  with ResponseLog(tmp_path, SETTINGS) as log:
    assert len(log.responses) == 2


def test_settings_of_a_folder_without_answers_are_replaced(tmp_path):
  with ResponseLog(tmp_path, SETTINGS):
    pass
  with ResponseLog(tmp_path, SETTINGS | {"prompt": "q"}):
    pass
  assert json.loads((tmp_path / "request.json").read_text())["prompt"] == "q"


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_answers_without_settings_are_refused(tmp_path, content):
  filled(tmp_path)
  (tmp_path / "request.json").unlink()
  if content:
    (tmp_path / "request.json").write_text(content)
  with pytest.raises(ValueError, match=r"request\.json is missing or damaged"):
    ResponseLog(tmp_path, SETTINGS).__enter__()


def test_two_runs_in_one_folder(tmp_path):
  with ResponseLog(tmp_path, SETTINGS):
    with pytest.raises(ValueError, match="another run is writing to"):
      ResponseLog(tmp_path, SETTINGS).__enter__()
  filled(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  write_whole(path, "old")
  with pytest.raises(UnicodeEncodeError):
    write_whole(path, "new\ud800")
  assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
