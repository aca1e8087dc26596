"""An architecture for each attention class of timm that has no recipe, judged by the oracle of benchmarks/coverage.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
from support.inside import registered

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.coverage import PAIRLESS, REPRESENTATIVES, RESULTS, Record, examine, tables

LAST = [Record(**r) for r in json.loads(RESULTS.read_text())["records"]]
READ = {
    r.name for r in LAST if {f"timm.{kind}" for kind in r.classes} <= set(registered())
}  # test_mechanisms.py compares recipes


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if timm.is_model(name) and name not in READ])
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


def test_the_readme_shows_the_tables_of_the_last_run() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    by_tool, by_class = tables(LAST).split("\n\n| class")
    assert by_tool in readme
    assert f"| class{by_class}" in readme
