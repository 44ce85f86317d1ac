"""The contract of every family, and the records themselves."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from contract import FamilyContract

from timm_dynamic import families
from timm_dynamic.families import FAMILIES, Family

ROOT = Path(__file__).parents[1]


class TestFamilies(FamilyContract):
    @pytest.fixture(params=FAMILIES)
    def family(self, request):
        return FAMILIES[request.param]


def test_records_of_several_files_are_joined(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {})
    parts = [
        Family("a", title="A", twins={"a_x": "x"}, timed=("a_x",)),
        Family("a", keeps=0.5, twins={"a_y": "y"}, timed=("a_y", "a_x")),
    ]
    for part in (*parts, *parts):
        families.register(part)
    joined = Family("a", title="A", keeps=0.5, twins={"a_x": "x", "a_y": "y"}, timed=("a_x", "a_y"))
    assert families.FAMILIES == {"a": joined}
    with pytest.raises(ValueError, match="the family a has two values for title: 'A' and 'B'"):
        families.register(Family("a", title="B"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        joined.title = "B"
    with pytest.raises(ValueError, match="resnet18 is no model of a"):
        families.family_of("resnet18.a1_in1k")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_has_its_models(family, script):
    """Written by `python docs/tables.py`: run it where this fails."""
    table = script("tables").models_table([FAMILIES[family]])
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    assert len(rows) == len(FAMILIES[family].models)
    readme = (ROOT / "README.md").read_text()
    assert not [row for row in rows if f"\n{row}\n" not in readme]


def test_the_readme_has_all_families(script):
    tables, readme = script("tables"), (ROOT / "README.md").read_text()
    assert tables.introduction(FAMILIES.values()) in readme and tables.papers(FAMILIES.values()) in readme
    assert sum(row.startswith("| `") for row in tables.parts(readme)["models"].splitlines()) == sum(
        len(family.models) for family in FAMILIES.values()
    )


def test_no_other_list_of_files_of_models():
    """A file in the folder is enough."""
    code = "import timm_dynamic, sys; print(*(m for m in sys.modules if m.startswith('timm_dynamic.models.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    files = {path.stem for path in (ROOT / "timm_dynamic" / "models").glob("*.py")} - {"__init__"}
    assert files <= {name.rpartition(".")[2] for name in loaded}


def test_the_architecture_page_has_the_layers_and_operators(script):
    tables, page = script("tables"), ROOT / "docs" / "architecture.md"
    texts = tables.written()[page]
    assert tables.parts(page.read_text()) == texts and len(texts) == 2
    assert texts["operators"].count("\n| `") <= 18  # the design's bound
