"""A family in one file: its layer, its models, its record (docs/adding-a-family.md). Importing it registers all."""

import torch
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from timm_dynamic.families import Family, register
from timm_dynamic.hub import build_model
from timm_dynamic.layers.base import DropInConv2d, copy_weight
from timm_dynamic.models._cfg import imagenet_cfg
from timm_dynamic.models._resnet import TINY


@register_notrace_module
class ToyConv2d(DropInConv2d):
    """Takes the place of an `nn.Conv2d`, with its arguments: `y = (1 + tanh(G mean(x))) * conv(x) + bias`, G linear."""

    family = "toy"
    routing_limit = 2.0

    def __init__(self, *args, device=None, dtype=None, **kwargs):
        super().__init__(*args, **kwargs)
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(*args, **{**kwargs, "bias": False}, **dd)
        self.gate = nn.Linear(self.in_channels, self.out_channels, bias=False, **dd)
        bias = torch.zeros(self.out_channels, **dd) if kwargs.get("bias", True) else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def formula(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.factors_of(x).to(y.dtype)[:, :, None, None] * y
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def factors(self, x: Tensor) -> Tensor:
        return 1 + torch.tanh(self.gate(x.mean((2, 3))))

    def routing(self, x: Tensor) -> Tensor:
        return self.factors_of(x)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        copy_weight(conv, self.conv.weight)
        self.gate.weight.zero_()  # a gate of 1 until it is trained

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.conv.weight.mul_(scale[:, None, None, None])
        self.bias = nn.Parameter(shift if self.bias is None else self.bias * scale + shift)


class ToyResNet(ResNet):
    """timm's `ResNet` with every `conv2` a `ToyConv2d`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in (module for module in self.modules() if isinstance(module, BasicBlock)):
            block.conv2 = ToyConv2d.from_conv(block.conv2)


about, small = {"paper_name": "On toys"}, {"num_classes": 10, "input_size": (3, 64, 64), "pool_size": (2, 2)}
default_cfgs = generate_default_cfgs(
    {
        "toy_resnet18.untrained": imagenet_cfg("conv1", "fc", **about),
        "test_toy_resnet.untrained": imagenet_cfg("conv1.0", "fc", **about, **small),
    }
)


@register_model
def toy_resnet18(pretrained: bool = False, **kwargs) -> ToyResNet:
    """Toy-ResNet-18."""
    return build_model(ToyResNet, "toy_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def test_toy_resnet(pretrained: bool = False, **kwargs) -> ToyResNet:
    return build_model(ToyResNet, "test_toy_resnet", pretrained, block=BasicBlock, **{**TINY, **kwargs})


register(
    Family(
        name="toy",
        title="Toy",
        about="one gate for each output channel",
        paper="Nobody, On toys",
        tiny="test_toy_resnet",
        layer=ToyConv2d,
        keeps=0.0,
        routing="the gates",
        twins={"toy_resnet18": "resnet18"},
    )
)
