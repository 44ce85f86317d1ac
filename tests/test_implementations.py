"""Every faster way of every layer, as its table has it, against the layer's formula in float64."""

import copy
import warnings
from collections import Counter

import pytest
import timm
import torch
from torch import nn

import timm_dynamic
from timm_dynamic.families import FAMILIES
from timm_dynamic.ops.implementation import situation_of

# Arguments of a convolution, and the size of its input.
CASES = {
    "3x3": ((8, 12, 3), {"padding": 1}, (9, 11)),
    "3x3, many outputs": ((16, 64, 3), {"padding": 1}, (3, 2)),
    "equal channels": ((12, 12, 3), {"padding": 1}, (7, 6)),
    "stride": ((6, 8, 3), {"padding": 1, "stride": 2, "bias": False}, (11, 8)),
    "dilation": ((6, 6, 3), {"padding": 2, "dilation": 2}, (9, 7)),
    "1x1": ((8, 20, 1), {"bias": False}, (7, 6)),
    "1x1, many outputs": ((24, 96, 1), {}, (2, 3)),
    "1x1 with stride": ((6, 8, 1), {"stride": 2}, (9, 10)),
    "groups": ((8, 12, 3), {"padding": 1, "groups": 4}, (6, 5)),
    "depthwise": ((8, 8, 5), {"padding": 2, "groups": 8}, (6, 7)),
    "reflect": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (9, 8)),
    "same": ((6, 4, (3, 5)), {"padding": "same"}, (8, 9)),
}
ROWS = [
    (name, row) for name, family in FAMILIES.items() if family.layer is not None for row in family.layer.implementations
]


def make_layer(family, case):
    """With random parameters and norms, or None if the family's layer is not for this convolution."""
    args, kwargs, size = CASES[case]
    try:
        layer = FAMILIES[family].layer(*args, **kwargs)
    except ValueError:
        return None, None
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.3), nn.init.normal_(module.bias)
            module.running_mean.normal_(), module.running_var.uniform_(0.3, 2)
    if hasattr(layer, "noise_std"):
        layer.noise_std = 0.0
    return layer, torch.randn(3, args[0], *size)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("family", "row"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_equals_the_formula(family, row, case, training):
    layer, x = make_layer(family, case)
    if layer is None:
        return
    layer.train(training)
    x.requires_grad_()
    with torch.set_grad_enabled(row.gradients):
        if row.reason_against(layer, x, situation_of(x)._replace(exported=row.exported)) is not None:
            return
        reference = copy.deepcopy(layer).double()
        wide = x.detach().double().requires_grad_()
        with torch.enable_grad():
            expected = reference.formula(wide)
        output = row.run(layer, x)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    for key, value in layer.named_buffers():  # running statistics
        torch.testing.assert_close(value.double(), reference.get_buffer(key).double(), rtol=1e-4, atol=1e-4)
    if not row.gradients:
        return
    weights = torch.randn_like(output)
    pairs = zip([x, *layer.parameters()], [wide, *reference.parameters()], strict=True)
    mine, theirs = zip(*((a, b) for a, b in pairs if b.requires_grad), strict=True)
    grads = torch.autograd.grad((output * weights).sum(), mine, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), theirs, allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize(("family", "row"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_is_tried(family, row):
    """Some of the cases above are for it."""
    tried = 0
    for case in CASES:
        layer, x = make_layer(family, case)
        for training in (False, True) if layer is not None else ():
            with torch.set_grad_enabled(row.gradients):
                situation = situation_of(x)._replace(exported=row.exported)
                tried += row.reason_against(layer.train(training), x, situation) is None
    assert tried >= 3


@pytest.mark.parametrize("name", sorted(family.tiny for family in FAMILIES.values() if family.layer is not None))
def test_a_network_equals_its_formulas(name):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = model(x)
        with timm_dynamic.use("formula"):
            expected = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    ("family", "case"),
    [(f, c) for f in dict(ROWS) for c in ("equal channels", "1x1, many outputs") if make_layer(f, c)[0] is not None],
)
def test_inputs_between_others(family, case, layout, gradients):
    """Views of a larger tensor, whose elements do not lie one after the other."""
    layer, x = make_layer(family, case)
    layer.eval()
    larger = torch.randn(3, 2 * x.shape[1], x.shape[2], 2 * x.shape[3])
    larger = larger.contiguous(memory_format={"NCHW": torch.contiguous_format}.get(layout, torch.channels_last))
    for view in (larger[:, : x.shape[1]], larger[:, ::2], larger[:, : x.shape[1], :, ::2], larger[::2, : x.shape[1]]):
        with torch.set_grad_enabled(gradients):
            output = layer(view)
        expected = copy.deepcopy(layer).double().formula(view.double())
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


# What runs: so that no way can drop out unseen.
RUNS = {
    ("test_dcd_resnet", "eval"): {"one call": 8, "formula": 1},
    ("test_dcd_resnet", "train"): {"training in one piece": 8, "formula": 1},
    ("test_ped_resnet", "eval"): {"one call": 8},
    ("test_ped_resnet", "train"): {"formula": 8},
    ("test_dy_resnet", "eval"): {"one call": 13},
    ("test_dy_resnet", "train"): {"formula": 13},
    ("test_od_resnet", "eval"): {"one call": 8},
    ("test_od_resnet", "train"): {"formula": 8},
    ("test_kw_resnet", "eval"): {"mixed in the cache": 11},
    ("test_kw_resnet", "train"): {"training in one piece": 11},
    ("test_ddf_resnet", "eval"): {"products": 4},
    ("test_ddf_resnet", "train"): {"formula": 4},
}


@pytest.mark.skipif(timm_dynamic.backend_info()["cpu"] != "loaded", reason="there are no CPU kernels here")
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize(("name", "mode"), RUNS, ids=lambda value: value)
def test_what_runs(name, mode, batch):
    if mode == "train" and batch == 1:
        batch = 2  # the norms of DCD's classifier want more than one sample
    model = timm.create_model(name).train(mode == "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = timm_dynamic.explain(model, torch.randn(batch, 3, 32, 32))
    runs = Counter(line.rpartition(": ")[2] for line in text.splitlines() if not line.startswith(" "))
    assert runs == RUNS[name, mode]
