"""DeepLabV3+ with dynamic convolutions: what a segmentation network has of timm's contract, and its own."""

import copy

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.utils.onnx import onnx_export, onnx_forward
from torch import nn

import timm_dynamic
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.hub import PACKAGE_WEIGHTS
from timm_dynamic.layers import DynamicConv2d

MODELS = timm.list_models("dy_deeplabv3plus_*")
TINY = {"backbone": "test_resnet", "width_multiplier": 0.05, "num_classes": 5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**kwargs):
    return timm.create_model(MODELS[0], **{**TINY, **kwargs})


def image(*size, batch=2, channels=3):
    return torch.randn(batch, channels, *size)


class TestArchitecture:
    @pytest.mark.parametrize(
        ("name", "parameters", "macs"),
        [
            ("dy_deeplabv3plus_mobilenetv2", 18_414_806, 26_953_768_600),
            ("dy_deeplabv3plus_mobilenetv2_050", 8_444_120, 9_269_695_248),
        ],
    )
    def test_size(self, name, parameters, macs):
        model = timm.create_model(name, device="meta").eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        counted = timm_dynamic.count_macs(model, torch.empty(1, 3, 513, 513, device="meta"))
        assert counted.static + counted.linear == macs and counted.executed == counted.static

    @pytest.mark.parametrize(("stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36))])
    def test_every_convolution_but_the_backbones_is_dynamic(self, stride, rates):
        model = timm.create_model(MODELS[0], device="meta", output_stride=stride)
        assert not any(isinstance(module, DynamicConv2d) for module in model.backbone.modules())
        parts = (model.aspp, model.decoder, model.classifier)
        layers = [module for part in parts for module in part.modules() if isinstance(module, DynamicConv2d)]
        assert not any(isinstance(module, nn.Conv2d) for part in parts for module in part.modules())
        shapes = [(layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.dilation[0]) for layer in layers]
        pyramid = [(320, 256, 1, 1), *((320, 256, 3, rate) for rate in rates), (320, 256, 1, 1), (1280, 256, 1, 1)]
        assert shapes == [*pyramid, (24, 48, 1, 1), (304, 256, 3, 1), (256, 256, 3, 1), (256, 21, 1, 1)]
        assert all(
            (layer.num_kernels, layer.attention.to_scores[0].out_features) == (4, layer.in_channels // 4)
            for layer in layers
        )
        assert [layer.kernels_bias is not None for layer in layers] == [False] * 9 + [True]

    @torch.no_grad()
    @pytest.mark.parametrize("stride", [16, 8])
    def test_with_one_kernel_it_is_deeplabv3plus(self, stride):
        """Computed from its weights with PyTorch's functions alone."""
        model = tiny(num_kernels=1, output_stride=stride).eval()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 2)
        x = image(70, 97)

        def layer(part, x, **options):
            y = F.conv2d(x, part.conv.kernels_weights[0], **options)
            return F.batch_norm(y, part.bn.running_mean, part.bn.running_var, part.bn.weight, part.bn.bias).relu()

        features = model.backbone(x)
        low, high = features[1], features[-1]
        assert low.shape[2:] == (18, 25) and high.shape[2:] == ((5, 7) if stride == 16 else (9, 13))
        first, *others = model.aspp.branches
        branches = [layer(first, high)]
        for branch, rate in zip(others, (6, 12, 18) if stride == 16 else (12, 24, 36), strict=True):
            branches.append(layer(branch, high, padding=rate, dilation=rate))
        pooled = layer(model.aspp.pool, F.adaptive_avg_pool2d(high, 1))
        branches.append(F.interpolate(pooled, high.shape[2:], mode="bilinear", align_corners=True))
        y = layer(model.aspp.project, torch.cat(branches, 1))
        y = F.interpolate(y, low.shape[2:], mode="bilinear", align_corners=True)
        y = torch.cat([y, layer(model.decoder.low, low)], 1)
        y = layer(model.decoder.conv2, layer(model.decoder.conv1, y, padding=1), padding=1)
        y = F.conv2d(y, model.classifier.kernels_weights[0], model.classifier.kernels_bias[0])
        torch.testing.assert_close(model(x), F.interpolate(y, (70, 97), mode="bilinear", align_corners=True))

    def test_dropout(self):
        rates = [
            module.p
            for module in timm.create_model(MODELS[0], device="meta").modules()
            if isinstance(module, nn.Dropout)
        ]
        assert rates == [0.5, 0.5, 0.1]
        assert {module.p for module in tiny(drop_rate=0).modules() if isinstance(module, nn.Dropout)} == {0}


class TestBackbones:
    @pytest.mark.parametrize(
        ("name", "stride"),
        [
            ("test_efficientnet", 16),
            ("test_convnext", 8),
            ("test_dy_resnet", 8),
            ("dynconv_mobilenetv2_050", 16),
            ("test_mambaout", 16),  # cannot be dilated, and its features are [B, H, W, C]
            ("densenet121", 8),  # cannot be dilated
        ],
    )
    def test_any_that_has_features(self, name, stride):
        """All that is there takes part."""
        model = tiny(backbone=name, output_stride=stride)
        output = model(image(97, 65))
        assert output.shape == (2, 5, 97, 65)
        output.square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    def test_pretrained(self):
        weights = load_file(PACKAGE_WEIGHTS / "test_dy_resnet.digits.safetensors")
        model = tiny(backbone="test_dy_resnet.digits", pretrained_backbone=True, in_chans=1)
        own = model.backbone.state_dict()
        same = [key for key in weights if key in own and key != "conv1.0.weight"]
        assert len(same) > 50 and all(torch.equal(own[key], weights[key]) for key in same)
        assert model(image(64, 64, channels=1)).shape == (2, 5, 64, 64)

    def test_cfg_follows(self):
        model = tiny(backbone="test_mambaout")
        cfg = model.backbone.pretrained_cfg
        assert (model.default_cfg["mean"], model.default_cfg["std"]) == (cfg["mean"], cfg["std"])
        assert model.default_cfg["first_conv"] == f"backbone.{cfg['first_conv']}"

    @pytest.mark.parametrize(
        ("kwargs", "expected"),
        [
            ({"output_stride": 32}, "output_stride must be 16 or 8, got 32"),
            ({"backbone": "resnet_50"}, "backbone 'resnet_50' is no timm model"),
            (
                {"backbone": "test_vit"},
                "backbone test_vit has features of strides 16, 16, 16: DeepLabV3. needs 4 and 16",
            ),
            (
                {"backbone_kwargs": {"nonsense": 1}},
                "backbone test_resnet cannot be created with features_only: .*nonsense",
            ),
            ({"width_multiplier": 0.01}, "width_multiplier 0.01 leaves no channels"),
            ({"anneal_steps": 0}, "anneal_steps must be at least 1, got 0"),
            ({"num_kernels": 0}, "num_kernels must be at least 1, got 0"),
            ({"features_only": True}, "dy_deeplabv3plus_mobilenetv2 has no features_only"),
        ],
    )
    def test_errors(self, kwargs, expected):
        with pytest.raises(ValueError, match=expected):
            tiny(**kwargs)

    def test_batch_of_one_in_training(self):
        model = tiny().train()
        with pytest.raises(ValueError, match="training needs more than one image"):
            model(image(64, 64, batch=1))
        model.aspp.pool.bn.eval()  # frozen
        assert model(image(64, 64, batch=1)).shape == (1, 5, 64, 64)


class TestContract:
    @pytest.mark.parametrize("name", MODELS)
    def test_registration(self, name):
        tag = f"{name}.untrained"
        assert timm.list_models(name, include_tags=True) == [tag]
        assert timm.get_pretrained_cfg(tag).hf_hub_id is None
        model = timm.create_model(name, device="meta")
        cfg, state = model.default_cfg, model.state_dict()
        assert f"{cfg['first_conv']}.weight" in state
        assert state[f"{cfg['classifier']}.kernels_weights"].shape[1] == cfg["num_classes"] == model.num_classes == 21
        with pytest.raises(ValueError, match=f"{name} has no static twin"):
            timm_dynamic.families.static_twin(name)

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(97, 65), (64, 64), (1, 1), (5, 130)])
    def test_head(self, size):
        model, x = tiny().eval(), image(*size, batch=1)
        features, output = model.forward_features(x), model(x)
        assert output.shape == (1, 5, *size)
        assert features.shape == (1, model.num_features, -(-size[0] // 4), -(-size[1] // 4))
        torch.testing.assert_close(model.forward_head(features, size), output)
        assert model.forward_head(features, pre_logits=True) is features
        assert model.forward_head(features).shape[2:] == tuple(4 * side for side in features.shape[2:])
        assert model.get_classifier() is model.classifier
        model.reset_classifier(3)
        assert model(x).shape == (1, 3, *size) and isinstance(model.classifier, DynamicConv2d)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), features)
        assert tiny(num_classes=0).eval()(x).shape == features.shape

    @torch.no_grad()
    def test_one_input_channel(self):
        assert tiny(in_chans=1).eval()(image(64, 64, channels=1)).isfinite().all()

    def test_a_training_step_reaches_every_parameter(self):
        model = timm.create_model(MODELS[1], num_classes=7, drop_path_rate=0.05).train()
        output = model(image(64, 64))
        F.cross_entropy(output, torch.randint(0, 7, (2, 64, 64))).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    def test_gradient_checkpointing(self):
        model, x = tiny(drop_rate=0.3), image(64, 64)
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            torch.manual_seed(1)
            model(x).square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad()
        torch.testing.assert_close(*gradients)

    def test_no_weight_decay(self):
        model = tiny()
        optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1)
        assert model.no_weight_decay() < {name for name, _ in model.named_parameters()}
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert id(model.classifier.kernels_bias) not in decayed and id(model.classifier.kernels_weights) in decayed

    @pytest.mark.parametrize("num_classes", [5, 3])
    def test_pretrained(self, tmp_path, num_classes):
        """Also with another number of classes."""
        saved = tiny().state_dict()
        save_file(saved, tmp_path / "model.safetensors")
        overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
        model = tiny(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
        other = {"classifier.kernels_weights", "classifier.kernels_bias"} if num_classes != 5 else set()
        for key, value in model.state_dict().items():
            assert value.shape[1] == 3 if key in other else torch.equal(value, saved[key])


class TestTemperature:
    def temperatures(self, model):
        layers = [layer for layer in model.modules() if isinstance(layer, DynamicConv2d)]
        found = {round(layer.temperature().item(), 4) for layer in layers}
        assert len(found) == 1
        return found.pop()

    def test_by_epochs(self):
        model = tiny()
        assert self.temperatures(model) == 1
        for epoch, expected in ((0, 30), (1, round(30 - 29 / 9, 4)), (9, 1), (50, 1)):
            timm_dynamic.set_progress(model, epoch, 100)
            assert self.temperatures(model) == expected

    def test_a_file_without_it(self, tmp_path):
        """Nor of the backbone's, which has its own."""
        model = tiny(backbone="test_dy_resnet", anneal_steps=4).eval()
        state = {key: value for key, value in model.state_dict().items() if "progress" not in key}
        assert len(state) == len(model.state_dict()) - 2
        save_file(state, tmp_path / "model.safetensors")
        load_checkpoint(model, tmp_path / "model.safetensors")
        assert self.temperatures(model) == 1

    def test_by_steps(self):
        """Of a dynamic backbone and a new classifier too; a copy follows its own count."""
        model = tiny(backbone="test_dy_resnet", anneal_steps=4, drop_rate=0).eval()
        model.reset_classifier(2)
        assert self.temperatures(model) == 30
        averaged = copy.deepcopy(model)
        for step in range(1, 7):
            model.train()(image(32, 32))
            assert self.temperatures(model.eval()) == max(1, 30 - 29 * step / 4)
        assert self.temperatures(averaged) == 30


class TestUses:
    @pytest.fixture
    def model(self):
        return tiny().eval()

    def test_compile(self):
        model, x = tiny(drop_rate=0, anneal_steps=4), image(65, 64)
        expected = copy.deepcopy(model)(x)
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    @torch.no_grad()
    def test_onnx(self, model, tmp_path):
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
        path = str(tmp_path / "model.onnx")
        onnx_export(model, path, batch_size=1, input_size=(3, 65, 97), use_dynamo=True)
        for batch in (1, 3):
            x = image(65, 97, batch=batch)
            torch.testing.assert_close(torch.from_numpy(onnx_forward(path, x)), model(x), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_channels_last_and_mixed_precision(self, model):
        x = image(65, 64)
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        assert output.dtype == torch.bfloat16 and (output.float() - expected).std() < 0.05 * expected.std()

    @torch.no_grad()
    def test_record(self, model):
        with timm_dynamic.record(model) as routing:
            model(image(64, 64))
        assert len(routing) == 10 and all(value.shape == (2, 4) for value in routing.values())
