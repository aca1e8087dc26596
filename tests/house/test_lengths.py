"""How long functions and files are, how much of them is said in words, and how many names the package shows."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import hookattn

PACKAGE = Path(__file__).parents[2] / "hookattn"
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """All that is parsed of every file, once."""
    return [(path, node) for path, source in SOURCES.items() for node in ast.walk(ast.parse(source))]


def length(body: list[ast.stmt]) -> int:
    """Lines from the first statement to the end of the last."""
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions() -> list[tuple[int, str]]:
    """Lines of every function's body, docstring left out, shortest first."""
    found = []
    for path, node in nodes():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((length(node.body[ast.get_docstring(node) is not None :]), f"{path.name}:{node.name}"))
    return sorted(each for each in found if each[0])


def share(lines: int) -> float:
    """Of all lines of the package."""
    return lines / sum(len(source.splitlines()) for source in SOURCES.values())


def test_functions_stay_short() -> None:
    lengths = functions()
    assert lengths[len(lengths) // 2][0] <= 6
    assert lengths[len(lengths) * 9 // 10][0] <= 15
    assert lengths[-1][0] <= 45, lengths[-1]


def test_files_stay_short() -> None:
    for path, source in SOURCES.items():
        limit = 320 if path.parent.name == "recipes" else 300
        assert len(source.splitlines()) <= limit, path


def test_comments_say_why_here_and_there() -> None:
    readers = (tokenize.generate_tokens(io.StringIO(source).readline) for source in SOURCES.values())
    comments = sum(token.type == tokenize.COMMENT for tokens in readers for token in tokens)
    assert 0.03 <= share(comments) <= 0.06


def test_docstrings_are_neither_missing_nor_novels() -> None:
    documented = [node for _, node in nodes() if isinstance(node, Documented)]
    lines = sum(length(node.body[:1]) for node in documented if ast.get_docstring(node))
    assert 0.15 <= share(lines) <= 0.25


def test_the_package_shows_few_names() -> None:
    assert len(hookattn.__all__) <= 19
