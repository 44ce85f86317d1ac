"""The contract of every family, and the records themselves."""

import dataclasses
import re
from pathlib import Path

import pytest
from contract import FamilyContract

from timm_dynamic import counts, families
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


def test_the_pages_have_what_code_and_measurements_say(script, monkeypatch, nothing_drawn_on_meta):
    """Written by `python docs/tables.py`: run it where this fails. Of the table of models, two rows of each family."""
    tables = script("tables")
    page = (ROOT / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*$", tables.parts(page)["models"], re.MULTILINE)
    assert sorted(rows) == sorted(name for family in FAMILIES.values() for name in family.models)
    known = counts.read()
    assert {name: list(rows) for name, rows in known.items()} == {name: f.models for name, f in FAMILIES.items()}
    for family in FAMILIES.values():
        for name in {family.tiny, *family.timed[:1]}:
            assert known[family.name][name] == tables.count(name)
            assert tables.table("", [tables._row(name, family)]).splitlines()[-1] in page
    monkeypatch.setattr(tables, "models_table", lambda families: tables.parts(page)["models"])
    written = tables.written()
    assert not [path for path, texts in written.items() if tables.parts(path.read_text()) != texts]
    readme, architecture = (written[ROOT / name] for name in ("README.md", "docs/architecture.md"))
    assert readme["families"].count("\n| ") == 1 + len(FAMILIES)
    assert architecture["operators"].count("\n| `") <= 18  # the design's bound


def test_the_code_in_the_readme_runs(capsys):
    """In one scope; the first block prints what stands below it."""
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 170
    first, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(first, scope)
    assert capsys.readouterr().out == re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    for code in others:
        exec(code, scope)
