"""Walls: what may import what, how long a function may be, what the package shows and what its README says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hookattn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hookattn"
FILES = sorted(PACKAGE.rglob("*.py"))

# from the ground up; a room may import from those before it, and from itself
ROOMS = [
    {"errors", "projected"},
    {"classes", "functional", "hooks", "stamps", "absent", "arguments", "threads", "eager", "checkpoints"},
    {"calls", "indexing", "chunks"},
    {"recipes"},
    {"folding"},
    {"modes"},
    {"replay", "tokens", "trace"},
    {"layouts", "gradients"},
    {"maps"},
    {"discovery"},
    {"forwards", "edits", "passing"},
    {"watching"},
    {"recorder"},
    {"analysis", "statistics", "testing", "inspection"},
    {"plot", "demo"},
    {"cli"},
    {"__main__"},
]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of our own that a file imports from, wherever in the file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    here = parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [base + tuple(node.module.split("."))] if node.module else [(*base, a.name) for a in node.names]
            found |= {name[1] for name in names if len(name) > 1}
    return found


@pytest.mark.parametrize("path", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_an_import_points_down(path: Path) -> None:
    height = next(i for i, rooms in enumerate(ROOMS) if room_of(path) in rooms)
    allowed = set().union(*ROOMS[:height]) | {room_of(path)}
    assert imported_rooms(path) <= allowed


def test_importing_hookattn_imports_no_optional_package() -> None:
    code = (
        "import sys, hookattn; "
        "print([m for m in ('matplotlib', 'typer', 'rich', 'zarr', 'timm', 'PIL', 'pytest') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_recipe_imports_timm() -> None:
    for path in FILES:
        if room_of(path) not in ("cli", "demo"):
            assert not re.search(r"^\s*(import|from) timm", path.read_text(), re.MULTILINE), path


def test_all_is_what_can_be_had() -> None:
    public = {name for name in vars(hookattn) if not name.startswith("_")}
    modules = {p.stem for p in FILES} | {p.name for p in PACKAGE.iterdir() if p.is_dir()} | {"annotations"}
    assert public - modules <= set(hookattn.__all__) <= public


def functions() -> list[tuple[int, str]]:
    """Lines of every function's body, docstring left out."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body:
                    found.append((body[-1].end_lineno - body[0].lineno + 1, f"{path.name}:{node.name}"))  # type: ignore[operator]
    return sorted(found)


def test_functions_and_files_stay_short() -> None:
    lengths = functions()
    assert lengths[-1][0] <= 60, lengths[-1]
    assert lengths[len(lengths) // 2][0] <= 8
    assert lengths[len(lengths) * 9 // 10][0] <= 25
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 400


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


def test_a_missing_extra_is_answered_with_what_to_type() -> None:
    block = "import sys; sys.modules[{missing!r}] = None\n"
    for missing, module, extra in (("matplotlib", "hookattn.plot", "plot"), ("typer", "hookattn.cli", "cli")):
        code = block.format(missing=missing) + f"import {module}"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
        assert "MissingExtraError: " in answer
        assert f'pip install "hookattn[{extra}]"' in answer
    code = block.format(missing="typer") + "from hookattn.__main__ import main; main()"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.strip() == 'hookattn: the command line needs typer and rich: pip install "hookattn[cli]".'


def readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_code_of_the_readme_prints_what_its_comments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "readme"}
    blocks = readme_blocks()
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
        for line in capsys.readouterr().out.splitlines():
            said = re.sub(r"#[#\s]*", "", block)
            place = re.search(r"timm/models/vision_transformer\.py:", line)  # the line number is timm's own affair
            assert (place.group() if place else line.strip()) in said
