"""One architecture for each attention class of timm, judged by the oracle of benchmarks/coverage.py, which runs them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # at the end: `coverage` is a package, too
from benchmarks.coverage import PAIRLESS, REPRESENTATIVES, examine
from benchmarks.readme_tables import ROOT, write_tables


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if timm.is_model(name)])
@pytest.mark.filterwarnings("ignore")
def test_the_maps_of_every_class_are_exact_or_refused_with_a_reason(name: str) -> None:
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
