"""A context variable that has another value for a while has its own again, however the block ends."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
from support.inside import Setting

variable: ContextVar[str] = ContextVar("variable", default="own")


def test_it_has_the_value_inside_alone() -> None:
    with Setting(variable, "outer") as begun, Setting(variable, "inner"):
        assert (begun, variable.get()) == ("outer", "inner")
    assert variable.get() == "own"


def test_it_is_put_back_where_the_block_raises() -> None:
    with Setting(variable, "outer"):
        with pytest.raises(ZeroDivisionError), Setting(variable, "inner"):
            raise ZeroDivisionError
        assert variable.get() == "outer"
    assert variable.get() == "own"
