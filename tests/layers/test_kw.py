"""KernelWarehouse's layer and the cells that layers share."""

import copy
import pickle

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import timm_dynamic
from timm_dynamic import dynamize
from timm_dynamic.layers import KWConv2d, Warehouse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def warehouses(model):
    return {module.warehouse for module in model.modules() if isinstance(module, KWConv2d)}


def resnet():
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=10)


def test_a_kernel_is_made_of_blocks():
    """In the order of taps, outputs, inputs; of another grid in each direction."""
    convs = [nn.Conv2d(8, 12, (3, 2), groups=2), nn.Conv2d(6, 4, 1)]
    warehouse = Warehouse(convs, cell_in_ratio=0.5)
    assert warehouse.cells.shape == (6 * 3 * 4 + 1 * 1 * 6, 4, 1)
    layer = KWConv2d(8, 12, (3, 2), groups=2, warehouse=warehouse)
    coefficients = torch.randn(2, 72, 79)
    kernels = layer.kernels(coefficients)
    for tap, out, into in ((0, 0, 0), (5, 11, 3), (3, 6, 1)):
        mixture = (tap * 3 + out // 4) * 4 + into
        expected = coefficients[:, mixture, :-1] @ warehouse.cells[:, out % 4, 0]
        torch.testing.assert_close(kernels[:, out, into, tap // 2, tap % 2], expected)


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((8, 12, 3), {"padding": 1, "stride": 2}),
        ((8, 12, 3), {"groups": 2, "bias": False}),
        ((8, 8, 5), {"groups": 8, "padding": "same", "padding_mode": "reflect"}),
        ((6, 8, 1), {}),
    ],
)
def test_from_conv(args, kwargs, ratio):
    conv, x = nn.Conv2d(*args, **kwargs), torch.randn(3, args[0], 9, 8)
    layer = KWConv2d.from_conv(conv.eval(), cell_num_ratio=ratio)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-6, atol=1e-6)
    basis = KWConv2d.from_conv(conv, cell_num_ratio=ratio, basis_ratio=0.5)
    torch.testing.assert_close(basis(x), conv(x), rtol=1e-6, atol=1e-6)
    timm_dynamic.set_progress(layer, 0, 10)
    nn.init.normal_(layer.attention.fc2.weight)
    torch.testing.assert_close(layer.train()(x), conv(x), rtol=1e-3, atol=1e-3)  # only the first cells
    assert not torch.allclose(layer.eval()(x), conv(x), rtol=1e-3, atol=1e-3)  # whatever the schedule


@pytest.mark.parametrize(
    ("epoch", "epochs", "done"), [(0, 300, 0), (5, 300, 0.25), (20, 100, 1), (99, 100, 1), (1, 8, 0.5), (2, 8, 1)]
)
def test_tau_falls_in_20_epochs_or_a_quarter_of_a_short_training(epoch, epochs, done):
    layer = KWConv2d(8, 8, 3)
    timm_dynamic.set_progress(layer, epoch, epochs)
    assert layer.progress(True).item() == pytest.approx(done)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.5, "less cells than parts of the kernel"),
        (1.5, "an integer, or one over an integer"),
        (-1, "less cells than"),
    ],
)
def test_what_cannot_be(ratio, message):
    with pytest.raises(ValueError, match=message):
        KWConv2d.from_conv(nn.Conv2d(4, 4, 3), cell_num_ratio=ratio)
    with pytest.raises(ValueError, match="cannot replace layer1.0.conv1, .*"):
        dynamize(resnet(), "kw", cell_num_ratio=ratio)


def test_warehouses_that_do_not_fit():
    with pytest.raises(ValueError, match="must be multiples of 2"):
        Warehouse([nn.Conv2d(4, 4, 3)], 0.5)
    with pytest.raises(ValueError, match="choose another cell_out_ratio"):
        Warehouse([nn.Conv2d(9, 9, 3)], cell_out_ratio=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_sample_and_autocast(dtype):
    layer, x = KWConv2d(8, 8, 3), 100 * torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype and all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.attention.norm1.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(dtype):
    layer, x = KWConv2d(8, 8, 3).to(dtype), torch.randn(4, 8, 6, 6).to(dtype)
    layer(x).float().square().mean().backward()
    norm = layer.attention.norm1
    assert norm.running_mean.dtype == dtype and norm.running_mean.any() and norm.num_batches_tracked == 1
    expected = copy.deepcopy(layer).float().eval()(x.float())
    torch.testing.assert_close(layer.eval()(x).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kwargs", [{}, {"groups": 2}, {"basis_ratio": 0.5, "cell_num_ratio": 4}, {"layer_norm": True}])
def test_torchscript(kwargs):
    layer, x = KWConv2d(8, 8, 3, **kwargs).eval(), torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


class TestSharing:
    def test_dynamize_goes_by_stage(self):
        static, x = resnet().eval(), torch.randn(2, 3, 64, 64)
        model = dynamize(copy.deepcopy(static), "kw", cell_num_ratio=2)
        torch.testing.assert_close(model(x), static(x), rtol=1e-5, atol=1e-5)
        for stage in (1, 2, 3, 4):
            (warehouse,) = warehouses(getattr(model, f"layer{stage}"))
            assert warehouse.taken == len(warehouse.cells)
        assert len(warehouses(model)) == 4
        keys = [key for key in model.state_dict() if key.endswith(".cells")]
        assert keys == [f"layer{stage}.0.conv1.warehouse.cells" for stage in (1, 2, 3, 4)]
        assert set(dict(model.named_parameters())) <= set(model.state_dict())

    def test_its_tensors_are_listed_once(self):
        """Also for who asks for all names, to swap what is behind each of them."""
        model = timm.create_model("test_kw_resnet")
        names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith("cells")]
        assert names == [f"warehouses.{i}.cells" for i in range(4)]
        alone = model.layer2[0].conv2  # has all that it needs
        assert "warehouse.cells" in dict(alone.named_parameters()) and "warehouse.cells" in alone.state_dict()

    def test_depthwise_layers_are_apart(self):
        model = dynamize(timm.create_model("test_efficientnet"), "kw")
        for warehouse in warehouses(model):
            layers = [m for m in model.modules() if isinstance(m, KWConv2d) and m.warehouse is warehouse]
            assert len({layer.groups > 1 for layer in layers}) == 1

    def test_frozen_convolutions(self):
        model = resnet()
        model.layer1.requires_grad_(False)
        model.layer2[0].conv1.requires_grad_(False)
        dynamize(model, "kw")
        assert not model.layer1[0].conv1.warehouse.cells.requires_grad
        assert model.layer2[0].conv1.warehouse.cells.requires_grad

    @pytest.mark.parametrize("make", ["test_kw_resnet", "dynamized"])
    def test_copies_and_checkpoints(self, make):
        model = dynamize(resnet(), "kw") if make == "dynamized" else timm.create_model(make, num_classes=10)
        x = torch.randn(2, 3, 64, 64)
        model.train()(x).square().mean().backward()
        model.eval()
        expected = model(x)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        others.append(copy.deepcopy(model).to_empty(device="cpu"))
        others[-1].load_state_dict(model.state_dict())
        meta = copy.deepcopy(model).to("meta")
        meta.load_state_dict(model.state_dict(), assign=True)
        ema = ModelEmaV3(model, decay=0.5)
        ema.update(model)
        for other in (*others, meta, ema.module):
            assert len(warehouses(other)) == 4 and not warehouses(other) & warehouses(model)
            assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())
            assert torch.equal(other(x), expected)

    def test_absorbed_norms_leave_it_shared(self):
        model = timm.create_model("test_kw_resnet").eval()
        fast = timm_dynamic.optimize(model)
        assert len(warehouses(fast)) == 4 and "11 dynamic layers took over the norm" in str(fast.report)

    @pytest.mark.parametrize("feature_cls", ["list", "getter"])
    def test_extractors_have_what_they_need(self, feature_cls):
        options = {"features_only": True, "feature_cls": feature_cls, "out_indices": (1, 2)}
        model = timm.create_model("test_kw_resnet", **options)
        sum(y.sum() for y in model(torch.randn(2, 3, 64, 64))).backward()
        cells = [key for key in model.state_dict() if key.endswith("cells")]
        assert len(cells) == (2 if feature_cls == "list" else 4)
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert not unused or feature_cls == "getter"
