"""An architecture for each attention class of timm that has no recipe, judged by the oracle of benchmarks/coverage.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
from support.inside import list_recipes

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # at the end: `coverage` is a package, too
from benchmarks.coverage import PAIRLESS, REPRESENTATIVES, examine
from benchmarks.coverage_table import read_records
from benchmarks.readme_tables import ROOT, write_tables

# classes that have a recipe are compared in test_mechanisms.py
COMPARED = {r.name for r in read_records() if {f"timm.{kind}" for kind in r.classes} <= set(list_recipes())}


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if timm.is_model(name) and name not in COMPARED])
@pytest.mark.filterwarnings("ignore")
def test_maps_of_classes_without_a_recipe_are_exact_or_refused_with_a_reason(name: str) -> None:
    record = examine(name, others=False)
    pairs = set(record.classes) - PAIRLESS
    assert record.hookattn == ("exact" if pairs else "raises"), record
    assert all(record.reasons.get(kind) for kind in set(record.classes) & PAIRLESS)
    assert not record.notes
    if pairs:
        assert record.same_output
        assert record.verify is not None
        assert record.verify < 1e-9
        assert record.entropy is not None
        assert 0.05 < record.entropy < 1  # maps are neither one-hot nor flat


@pytest.mark.parametrize("readme", ["README.md", "benchmarks/README.md"])
def test_the_readmes_show_the_tables_of_the_last_results(readme: str) -> None:
    text = (ROOT / readme).read_text()
    assert "<!-- table: " in text
    assert write_tables(text) == text
