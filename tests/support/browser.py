"""Pages in Debian's chromium, driven by playwright: opened from disk, with whatever goes wrong in them noted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@contextmanager
def start_browser() -> Iterator[Any]:
    """Chromium without a window; a test is skipped where it is missing, and fails where HOOKATTN_NEEDS_BROWSER says so."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        missing = "pages are tested in chromium by playwright: apt-get install chromium; pip install playwright"
        (pytest.fail if os.environ.get("HOOKATTN_NEEDS_BROWSER") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Opened:
    """A page that was opened from disk.

    Attributes:
        page: of playwright.
        wrong: what the page complained of, and what it asked for that is not in itself.
    """

    def __init__(self, browser: Any, path: Path, fragment: str = "", width: int = 1280, **options: Any) -> None:
        self._context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self._context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(f"{path.as_uri()}{fragment}")
        self.ask("window.hookattn.ready")
        self.settle()

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")) and not (
            request.is_navigation_request() and request.url[:5] == "file:"
        ):
            self.wrong.append(f"asked for {request.url}")

    def close(self) -> None:
        self._context.close()

    def ask(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def settle(self) -> None:
        """Let what was done be drawn."""
        self.ask(_FRAMES)

    def wait_until(self, expression: str) -> None:
        """Wait for what the page does in its own time; fail after three seconds."""
        for _ in range(60):
            if self.ask(expression):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"it does not come: {expression}")

    def place_of(self, y: float, x: float) -> tuple[float, float]:
        """Where a point of the photo lies on the screen, as (x, y)."""
        frame = self.page.locator(".frame canvas").last
        frame.scroll_into_view_if_needed()
        box = frame.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def hover(self, y: float, x: float) -> None:
        self.page.mouse.move(*self.place_of(y, x))
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()

    def choose(self, layer: str, head: int | str) -> None:
        name = "mean of heads" if head == "mean" else f"head {head}"
        self.page.get_by_role("button", name=f"{layer}, {name}", exact=True).click()
        self.settle()

    def cells(self) -> list[float]:
        """What each patch has in the panel over the photo."""
        return list(self.ask("Array.from(hookattn.view().panel.cells)"))

    def numbers(self) -> dict[str, str]:
        """What is written under the photo."""
        rows = self.page.locator("#numbers > div").all()
        return {row.locator("dt").inner_text(): row.locator("dd b").inner_text() for row in rows}
