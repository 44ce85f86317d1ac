"""A family from outside of the package (tests/toy_family.py) passes the contract of ours, and is known everywhere."""

import importlib
import re
import sys

import pytest
from contract import CfgContract, FamilyContract, ModelContract, NameContract
from timm.models import _registry

from timm_dynamic import cli, counts, families


@pytest.fixture(scope="module", autouse=True)
def toy():
    """Registers the family, and forgets it afterwards."""
    registries = [families.FAMILIES, *(value for value in vars(_registry).values() if isinstance(value, (dict, set)))]
    before = [registry.copy() for registry in registries]
    importlib.import_module("toy_family")
    yield families.FAMILIES["toy"]
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    del sys.modules["toy_family"]


class TestRecords(NameContract, CfgContract):
    @pytest.fixture(params=["toy_resnet18", "test_toy_resnet"])
    def name(self, request):
        return request.param


class TestModels(ModelContract):
    @pytest.fixture(scope="module")
    def name(self):
        return "test_toy_resnet"


class TestFamily(FamilyContract):
    @pytest.fixture
    def family(self, toy):
        return toy


def test_it_is_known_everywhere(toy, script, capsys, tmp_path, monkeypatch):
    assert toy.models == ["test_toy_resnet", "toy_resnet18"]
    assert families.family_of("toy_resnet18.untrained") is toy and families.layers()["toy"] is toy.layer
    monkeypatch.setattr(counts, "FILE", tmp_path / "counts.json")  # as `python docs/tables.py` writes it
    counts.FILE.write_text(script("tables").counted([toy]))
    assert cli.main(["list", "--family", "toy"]) == 0
    out = capsys.readouterr().out
    assert "--dynamize toy: ToyConv2d, with from_scratch\n" in out
    assert re.search(r"toy_resnet18 +12.39 M +1.81\d GMACs at 224 px +twin resnet18", out)
    table = script("tables").models_table([toy])
    assert "| `toy_resnet18` | 12.39 M | 1.81 G |" in table and "`resnet18`, 1.81 G" in table
    assert script("tables").papers([toy]) == "Toy: Nobody, On toys."
