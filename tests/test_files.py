"""Files appear whole or not at all."""

import pytest

from vrt_jax.files import write_whole


def test_written_as_utf8_and_replaced(tmp_path):
  path = tmp_path / "a.json"
  for text in ("first", "größer\n"):
    write_whole(path, text)
    assert path.read_bytes() == text.encode("utf-8")
  assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  write_whole(path, "old")
  with pytest.raises(UnicodeEncodeError):
    write_whole(path, "new \ud800")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]
