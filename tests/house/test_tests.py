"""Tests of the tests: they stand in rooms, share what is in support alone, and have one door to the inside of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "hookattn"
FILES = sorted(TESTS.rglob("*.py"))
FACES = {
    "hookattn",
    "hookattn.errors",
    "hookattn.analysis",
    "hookattn.cli",
    "hookattn.cli.app",
    "hookattn.figures",
    "hookattn.figures.plot",
    "hookattn.image",
}
FACES |= {"hookattn.testing", "hookattn.extraction"}


def imports_of(path: Path) -> Iterator[str]:
    """Modules that a file imports or imports from, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if module in ("support", "tests"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_test_file_imports_from_another(path: Path) -> None:
    for module in imports_of(path):
        assert not module.startswith((".", "tests", "conftest")), module
        assert not any(part.startswith("test_") for part in module.split(".")), module


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "inside.py"], ids=lambda p: p.stem)
def test_what_is_taken_from_the_inside_of_the_package_is_taken_in_one_place(path: Path) -> None:
    assert {module for module in imports_of(path) if module.split(".")[0] == "hookattn"} <= FACES


def test_what_judges_the_package_does_not_know_it() -> None:
    for name, known in (("reference", set()), ("modes", set()), ("oracle", {"support.modes"}), ("untouched", set())):
        ours = {module for module in imports_of(TESTS / "support" / f"{name}.py") if module.startswith(("hookattn", "support"))}
        assert ours <= known, name


@pytest.mark.parametrize("path", sorted((PACKAGE / "conditions").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_each_condition_has_a_test_file_of_its_name(path: Path) -> None:
    assert (TESTS / "conditions" / f"test_{path.name}").exists()


def test_every_file_of_tests_stands_in_a_room_and_is_collected() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"house"}
    for path in FILES:
        room = path.relative_to(TESTS).parts[0]
        assert room in {"conftest.py", "support"} or (room in rooms and path.name.startswith(("test_", "conftest"))), path
