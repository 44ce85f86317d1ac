"""KernelWarehouse's networks: sizes, cells, the authors' formats."""

import json
import math
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
from timm_dynamic.layers import KWConv2d

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


def places_of_mobilenetv2(model, pointwise, half):
    """The names of the layers of each warehouse, in the order of its first use."""
    stages = [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6]  # the first block of a stage has the number before
    blocks = [f"blocks.{i}.{j}." for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    places = {"stem": ["conv_stem"]}
    for stage, block in zip(stages, blocks, strict=True):
        kinds = {"conv_pw": "pw0", "conv_dw": "dw", "conv_pwl": "pw1"} if block != blocks[0] else {}
        for name, kind in (kinds or {"conv_dw": "dw", "conv_pw": "pw1"}).items():
            if kind == "dw" or not half or stage == 6:
                key = (stage, kind if kind == "dw" or not pointwise else "pw")
                places.setdefault(key, []).append(block + name)
    places[6, "pw" if pointwise else "pw1"].append("conv_head")
    return [*places.values(), *([["classifier.conv"]] if half else [])]


def places_of_convnext(model):
    places = [["stem.0"], *([f"stages.{i}.downsample.1"] for i in (1, 2, 3))]
    for i, stage in enumerate(model.stages):
        blocks = [f"stages.{i}.blocks.{j}" for j in range(len(stage.blocks))]
        places.append([f"{block}.conv_dw" for block in blocks])
        places.append([f"{block}.mlp.{name}" for block in blocks for name in ("fc1", "fc2")])
    return places


HALF = [1] * 6 + [0.5, 1, 0.5, 0.5], [1] * 6 + [0.5, 1, 0.5, 1], [1] * 6 + [0.5, 1, 0.5, 0.025]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "resnet" not in name])
def test_which_layers_share_cells(name):
    """Where there is no case of the authors' numbers: whose cells, how many, in which order, of what size."""
    model, convnext, ratio = timm.create_model(name, device="meta"), "convnext" in name, name.partition("_")[0]
    if convnext:
        wanted = places_of_convnext(model)
    else:
        wanted = places_of_mobilenetv2(model, ratio == "kw1x", ratio == "kw1d2x")
    assert len(wanted) == {"kw1d2x": 10, "kw1x": 12 if convnext else 13, "kw4x": 19}[ratio]
    ratios = HALF if ratio == "kw1d2x" else ([4 if ratio == "kw4x" else 1] * len(wanted), [1] * 19, [1] * 19)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWConv2d)}
    assert sorted(layers) == sorted(sum(wanted, []))
    for warehouse, names, number, out, into in zip(model.warehouses.values(), wanted, *ratios, strict=False):
        mine = {name: layer for name, layer in layers.items() if layer.warehouse is warehouse}
        assert sorted(mine) == sorted(names)
        outputs = max(int(math.gcd(*(layer.out_channels for layer in mine.values())) * out), 1)
        inputs = max(int(math.gcd(*(layer.in_channels // layer.groups for layer in mine.values())) * into), 1)
        start = 0
        for layer in mine.values():  # in the order of the modules
            taps = math.prod(layer.kernel_size)
            mixtures = taps * (layer.out_channels // outputs) * (layer.in_channels // layer.groups // inputs)
            assert (layer.attention.mixtures, layer.attention.local.start) == (mixtures, start)
            start += int(mixtures * number)
        assert warehouse.cells.shape == (start, outputs, inputs)
        for layer in mine.values():
            attention, hidden = layer.attention, max(int(layer.in_channels / (32 if ratio == "kw1d2x" else 16)), 16)
            assert attention.fc1.weight.shape == (hidden, layer.in_channels)
            assert attention.fc2.weight.shape == (attention.mixtures * (start + 1), hidden)
            assert (layer.bias is not None) == (attention.fc1.bias is not None) == convnext or "classifier" in names[0]
            assert (
                type(attention.norm1) is (nn.LayerNorm if convnext else nn.BatchNorm1d) and attention.norm1.eps == 1e-5
            )
    assert [key for key in model.state_dict()][: len(wanted)] == [f"warehouses.{i}.cells" for i in range(len(wanted))]


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


@pytest.mark.parametrize(
    ("name", "nested"),
    [
        ("kw1d2x_mobilenetv2_050", True),
        ("kw1d2x_mobilenetv2_050", False),
        ("kw4x_mobilenetv2_050", True),
        ("kw1x_convnext_tiny", False),
    ],
)
def test_authors_names(name, nested, tmp_path):
    torch.manual_seed(0)
    options = {"depths": (2, 1, 1, 1), "dims": (16, 24, 32, 48)} if "convnext" in name else {}
    model, other = (timm.create_model(name, **options) for _ in range(2))
    torch.save({"model": authors(model, nested), "epoch": 1}, tmp_path / "checkpoint.pth")
    load_checkpoint(other, tmp_path / "checkpoint.pth")
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["kw1d2x_mobilenetv2_050", "kw1x_mobilenetv2_050"])
def test_an_empty_batch(name):
    assert timm.create_model(name, num_classes=7).eval()(torch.randn(0, 3, 64, 64)).shape == (0, 7)


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
