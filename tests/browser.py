"""Pages in headless Chromium; tests that need it skip with a message where it is missing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[object]:
  """A Playwright browser."""
  sync_api = pytest.importorskip("playwright.sync_api", reason="needs the [test] extra")
  if CHROMIUM is None:
    pytest.skip("needs Chromium (Debian: apt install chromium)")
  options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
    yield browser
    browser.close()


@contextmanager
def opened(browser: object, url: str | Path, width: int = 1280, height: int = 900, **options):
  """A page at `url`; in the end it must have logged no error and asked no other server."""
  address = url.as_uri() if isinstance(url, Path) else url
  context = browser.new_context(viewport={"width": width, "height": height}, **options)
  page = context.new_page()
  errors, asked = [], []
  page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
  page.on("pageerror", lambda error: errors.append(str(error)))
  page.on("request", lambda request: asked.append(request.url))
  page.goto(address)
  yield page
  assert errors == []
  allowed = (address.split("?")[0], "data:", "blob:")
  assert [u for u in asked if not u.startswith(allowed)] == []
  context.close()
