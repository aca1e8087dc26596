"""Rooms: what may import what, what the package shows, and what the drawing of its errors leaves out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hookattn

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hookattn"
FILES = sorted(PACKAGE.rglob("*.py"))


def listed(docstring: str | None) -> list[str]:
    """Names that a docstring lists, one a line: four spaces, the name, more spaces, what it is."""
    return re.findall(r"^    (\w+) {2,}\S", docstring or "", re.MULTILINE)


def order_of(package: Path) -> list[str]:
    """The rooms, or the files of a room, as the docstring of its `__init__` lists them: each may import from those below it."""
    return listed(ast.get_docstring(ast.parse((package / "__init__.py").read_text()), clean=False))


def place_of(path: Path) -> tuple[str, ...]:
    """Rooms and the file in them."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Places of our own that a file imports from, wherever in the file."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            module = base + tuple((node.module or "").split(".")) if node.module else base
            for alias in node.names:
                inner = (*module, alias.name)
                found.add(
                    inner
                    if PACKAGE.joinpath(*inner).is_dir() or PACKAGE.joinpath(*inner).with_suffix(".py").exists()
                    else module
                )
    return found


@pytest.mark.parametrize("package", [PACKAGE, *sorted({f.parent for f in FILES} - {PACKAGE})], ids=lambda p: p.name)
def test_a_room_lists_its_files(package: Path) -> None:
    entries = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert sorted(order_of(package)) == sorted(entries - {"__init__", "__main__"})


def test_there_are_at_most_twelve_rooms() -> None:
    assert len({*order_of(PACKAGE)} - {"errors"}) <= 12  # a file, on which all of them rest


@pytest.mark.parametrize("path", [f for f in FILES if f.name not in ("__init__.py", "__main__.py")], ids=lambda p: p.stem)
def test_an_import_points_down(path: Path) -> None:
    here = place_of(path)
    for there in imports_of(path):
        same = next(i for i, (a, b) in enumerate(zip((*here, ""), (*there, ""))) if a != b)
        order = order_of(PACKAGE.joinpath(*here[:same]))
        assert there[same:], f"{path} imports from the face of its own room"
        assert order.index(there[same]) > order.index(here[same]), (here, there)


def test_the_face_of_a_room_only_names_its_parts() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                if path.parent == PACKAGE and isinstance(node, ast.If):
                    continue
                assert isinstance(node, (ast.ImportFrom, ast.Assign, ast.Expr)), path


def test_what_is_imported_when_asked_for_is_what_type_checkers_are_told() -> None:
    face = ast.parse((PACKAGE / "__init__.py").read_text()).body
    (late,) = (node for node in face if isinstance(node, ast.If))
    assert all(isinstance(node, ast.ImportFrom) for node in late.body)
    told = {alias.name: node.module for node in late.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == vars(hookattn)["_PLACES"]
    with pytest.raises(AttributeError, match="module 'hookattn' has no attribute 'recorder'"):
        _ = vars(hookattn)["__getattr__"]("recorder")


def test_image_and_conditions_rest_on_errors_alone() -> None:
    for path in FILES:
        if (room := place_of(path)[:1]) in (("image",), ("conditions",)):
            assert {there[:1] for there in imports_of(path)} <= {room, ("errors",)}, path


def test_no_recipe_imports_timm() -> None:
    for path in FILES:
        if place_of(path)[:1] != ("cli",):
            assert not re.search(r"^\s*(import|from) timm", path.read_text(), re.MULTILINE), path


def test_all_is_what_can_be_had() -> None:
    public = {name for name in dir(hookattn) if not name.startswith("_")}
    modules = {p.stem for p in FILES} | {p.name for p in PACKAGE.iterdir() if p.is_dir()} | {"annotations", "TYPE_CHECKING"}
    assert public - modules <= set(hookattn.__all__) <= public
    assert all(hasattr(hookattn, name) for name in hookattn.__all__)


def test_the_exception_tree_is_drawn_whole() -> None:
    errors = vars(hookattn.errors)
    classes = {name for name, value in errors.items() if isinstance(value, type) and issubclass(value, hookattn.HookattnError)}
    assert classes == set(re.findall(r"\w+Error\b", hookattn.errors.__doc__ or "")) - {
        "TypeError",
        "KeyError",
        "LookupError",
        "ValueError",
        "ImportError",
    }
