"""KernelWarehouse's networks: sizes, cells, the authors' formats."""

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from timm_dynamic.convert import load_checkpoint

DATA = Path(__file__).parents[1] / "data"
PARAMETERS = {
    "kw1d4x_resnet18": 4_031_768,
    "kw1d2x_resnet18": 7_431_044,
    "kw1x_resnet18": 11_932_148,
    "kw2x_resnet18": 23_242_127,
    "kw4x_resnet18": 45_862_085,
    "kw1d2x_resnet50": 17_638_264,
    "kw1x_resnet50": 28_052_310,
    "kw4x_resnet50": 102_015_144,
    "kw1d2x_mobilenetv2": 2_654_396,
    "kw1x_mobilenetv2": 5_168_146,
    "kw4x_mobilenetv2": 11_379_382,
    "kw1d2x_mobilenetv2_050": 1_466_888,
    "kw1x_mobilenetv2_050": 2_854_522,
    "kw4x_mobilenetv2_050": 4_648_587,
    "kw1x_convnext_tiny": 39_370_674,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    """Those of the authors' networks."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert all(warehouse.taken == len(warehouse.cells) for warehouse in model.warehouses.values())


@pytest.mark.parametrize("name", ["kw1x_resnet18", "kw1d2x_resnet50"])
def test_cells(name):
    """Which ones a layer has and begins with."""
    model = timm.create_model(name, device="meta")
    structure = json.loads((DATA / f"{name}.json").read_text())["structure"]
    for row in structure["layers"]:
        layer = model.get_submodule(row["name"])
        assert layer.warehouse is model.warehouses[str(row["warehouse"])]
        attention = layer.attention
        first = layer.warehouse.first_cells(attention.local.start, attention.mixtures)
        sizes = (attention.mixtures, len(layer.warehouse.cells), attention.local.start)
        assert sizes == (row["mixtures"], row["cells"], row["start"])
        assert f"{zlib.crc32(struct.pack(f'<{len(first)}q', *first.tolist())):08x}" == row["onehot_crc32"]


def authors(model, nested):
    """A state dict of ours under the authors' names."""
    if hasattr(model, "stages"):
        theirs = (
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"\.blocks\.(\d)\.", r".\1."),
            (r"\.conv_dw\.", ".dwconv."),
            (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
            (r"^head\.norm\.", "norm."),
            (r"^head\.fc\.", "head."),
        )
    else:
        places = ("0.0", "0.1", "1.0", "1.1", "2", "3") if nested else ("0", "1", "3", "4", "6", "7")
        theirs = [(r"^conv_stem\.", "features.0.0."), (r"^bn1\.", "features.0.1.")]
        theirs += [(r"^conv_head\.", "features.18.0."), (r"^bn2\.", "features.18.1.")]
        theirs += [(r"^classifier\.", "classifier.1." if nested else "classifier.")]
        blocks = [(i, j) for i, stage in enumerate(model.blocks) for j in range(len(stage))]
        for number, (i, j) in enumerate(blocks, 1):
            if number == 1:
                names = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
                names = names if nested else {"conv_dw": "0", "bn1": "1", "conv_pw": "3", "bn2": "4"}
            else:
                names = dict(zip(("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), places, strict=True))
            for ours, place in names.items():
                theirs.append((rf"^blocks\.{i}\.{j}\.{ours}\.", f"features.{number}.conv.{place}."))
    state = {}
    for key, value in model.state_dict().items():
        if match := re.fullmatch(r"warehouses\.(\d+)\.cells", key):
            state[f"warehouse_manager.weights.{match[1]}"] = value[..., None, None]
            continue
        for pattern, name in theirs:
            key, found = re.subn(pattern, name, key)
            if found and not hasattr(model, "stages"):
                break
        state[key] = value[None, :, None, None] if key.endswith("gamma") else value
    return state


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", ["kw1d2x_mobilenetv2_050", "kw4x_mobilenetv2_050", "kw1x_convnext_tiny"])
def test_authors_names(name, nested, tmp_path):
    torch.manual_seed(0)
    model, other = (timm.create_model(name) for _ in range(2))
    torch.save({"model": authors(model, nested), "epoch": 1}, tmp_path / "checkpoint.pth")
    load_checkpoint(other, tmp_path / "checkpoint.pth")
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())


def test_other_channels_and_classes_than_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path))
    name = "kw1d2x_mobilenetv2_050"
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / f"{name}.in1k.safetensors")
    other = timm.create_model(name, pretrained=True, num_classes=5, in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other.forward_features(x), model.forward_features(x.expand(-1, 3, -1, -1)))
    assert other(x).shape == (2, 5)


def test_cut_into_its_parts():
    """The warehouses come first, and do nothing as a step."""
    model = timm.create_model("test_kw_resnet").eval()
    names = [name for name, _ in model.named_children()]
    assert names[0] == "warehouses" and names[-2:] == ["global_pool", "fc"]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(nn.Sequential(*list(model.children())[:-2])(x), model.forward_features(x))
