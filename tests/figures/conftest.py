"""A browser for tests of pages, and pages in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Opened, start_browser


# not for the whole session: while playwright runs, no event loop can be run in its thread, as other tests do
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with start_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a page; at the end of a test none may have complained, or asked for anything that is not in it."""
    opened: list[Opened] = []

    def open_it(path: Path, *args: Any, **options: Any) -> Opened:
        opened.append(Opened(browser, path, *args, **options))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()
    assert [each.wrong for each in opened] == [[] for _ in opened]
