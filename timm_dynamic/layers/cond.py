"""Conditionally parameterized convolution: a sum of experts' kernels, weighed by what routes a sample.

Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019 (arXiv
1904.04971). Parameters are named and laid out as in timm.
"""

import copy
from typing import Any

import torch
from timm.layers import CondConv2d as TimmCondConv2d
from timm.layers import pad_same, register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import DropInConv2d, check_positive
from timm_dynamic.layers.stand_in import stand_in_bias
from timm_dynamic.ops import mixed_conv2d
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.sample_conv.samples import around_mean


@register_notrace_module
class RoutedConv2d(TimmCondConv2d):
    """timm's `CondConv2d`, to whose forward a routing is given, computed by `timm_dynamic.ops.mixed_conv2d`.

        y = conv(x, sum_e routing_e weight_e) + sum_e routing_e bias_e

    Args:
        *args, **kwargs: Those of `timm.layers.CondConv2d`.

    Attributes:
        shift: A part of the bias that nothing routes, `[out_channels]`, where the layer has absorbed a norm.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_parameter("shift", None)

    @staticmethod
    def adopt(model: nn.Module) -> int:
        """Make every `timm.layers.CondConv2d` of a model one of these, in place: the same parameters and numbers.

        Returns:
            How many.
        """
        found = [one for one in model.modules() if type(one) is TimmCondConv2d and "forward" not in vars(one)]
        for layer in found:
            layer.__class__ = RoutedConv2d
            layer.register_parameter("shift", None)
        return len(found)

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        padding = self.padding
        if self.dynamic_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        shape = (self.num_experts, self.out_channels, self.in_channels // self.groups)
        kernels = self.weight.view(shape + self.kernel_size)
        y = mixed_conv2d(x, routing_weights, kernels, self.stride, padding, self.dilation, self.groups)
        if self.bias is not None:
            # Not a product: autocast would cast it.
            y = y + torch.sum(routing_weights[:, :, None] * self.bias, 1)[:, :, None, None].to(y.dtype)
        return y if self.shift is None else y + self.shift[:, None, None].to(y.dtype)

    @torch.jit.unused
    def absorb(self, scale: Tensor, shift: Tensor) -> "RoutedConv2d":
        """A copy of the layer that gives `scale * y + shift` for the output y: a norm behind it.

        Args:
            scale, shift: One number for each output channel.

        Raises:
            ValueError: If a parameter is no plain one.
        """
        if any(type(one) is not nn.Parameter for one in self.parameters()):
            raise ValueError("a dynamic layer cannot absorb a norm: a parameter is no plain one")
        layer = copy.deepcopy(self)
        with torch.no_grad():
            layer._absorb(scale, shift)
        return layer

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.weight.view(self.num_experts, self.out_channels, -1).mul_(scale[:, None])
        if self.bias is not None:
            self.bias.mul_(scale)
        self.shift = nn.Parameter(shift.to(self.weight) if self.shift is None else self.shift * scale + shift)


@register_notrace_module
class CondConv2d(DropInConv2d):
    """Conditionally parameterized convolution with its routing; takes the place of an `nn.Conv2d`.

        y = conv(x, sum_e r_e weight_e) + sum_e r_e bias_e,    r = sigmoid(routing_fn(mean(x)))

    with a linear layer `routing_fn`, and the experts' weights and biases in `experts`, a `RoutedConv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: As for
            `nn.Conv2d`.
        num_experts: E.
        neutral_gates: The routing is `2 * sigmoid`, of a score over the root of `in_channels`, lest its first steps
            outpace the kernel's, and `experts` holds the sum of the experts of a sample that is routed evenly, and how
            far all but the first one are from a share of it. `from_conv` sets it; the authors' networks do without.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "cond"
    exact = {"neutral_gates": True}
    parts = ((nn.Linear, "routing_fn"), (RoutedConv2d, "experts"))
    reference_names = {"routing": "routing_fn", "cond_conv": "experts"}  # those of ParameterNet's layer
    __jit_unused_properties__ = ["weight", "bias"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        num_experts: int = 4,
        neutral_gates: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(num_experts=num_experts)
        self.num_experts, self.neutral_gates = num_experts, neutral_gates
        self.routing_limit = 2.0 if neutral_gates else 1.0
        dd = {"device": device, "dtype": dtype}
        options = (self.kernel_size, self.stride, self.zero_padding, self.dilation, groups, bias, num_experts)
        self.routing_fn = nn.Linear(in_channels, num_experts, **dd)
        self.experts = RoutedConv2d(in_channels, out_channels, *options, **dd)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """All samples are routed evenly, and the experts add up to `conv`: until trained, the output is `conv`'s.

        They differ by noise of a tenth of the weight's standard deviation, without which they would stay equal.
        """
        nn.init.zeros_(self.routing_fn.weight), nn.init.zeros_(self.routing_fn.bias)
        noise = 0.1 * torch.randn_like(self.experts.weight) * conv.weight.std(correction=0)
        targets = [(self.experts.weight, conv.weight, noise)]
        if conv.bias is not None:
            targets.append((self.experts.bias, conv.bias, torch.zeros_like(self.experts.bias)))
        for experts, static, apart in targets:
            if self.neutral_gates:
                apart[0] = static.flatten()
            else:
                apart += 2 / self.num_experts * static.flatten() - apart.mean(0)
            experts.copy_(apart).requires_grad_(static.requires_grad)

    @stand_in_bias
    def bias(self) -> Tensor | None:
        """That of a sample that is routed evenly, `[out_channels]`."""
        biases, shift = self.experts.bias, self.experts.shift
        if biases is None:
            return shift
        bias = biases[0] if self.neutral_gates else biases.sum(0) / 2
        return bias if shift is None else bias + shift

    def formula(self, x: Tensor) -> Tensor:
        return self.experts(self.pad(x), self.coefficients(self.factors_of(average(x))))

    def factors(self, pooled: Tensor) -> Tensor:
        """The routing, `[B, num_experts]`."""
        scores = self.routing_fn(pooled.to(self.experts.weight.dtype))
        return 2 * torch.sigmoid(scores * self.in_channels**-0.5) if self.neutral_gates else torch.sigmoid(scores)

    def coefficients(self, routing: Tensor) -> Tensor:
        """What the entries of `experts.weight` are multiplied by, `[B, num_experts]`."""
        if not self.neutral_gates:
            return routing
        shares = routing / self.num_experts
        return around_mean(shares, shares.sum(1, keepdim=True))

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: how much of every expert a sample gets, `[B, num_experts]`."""
        return self.factors_of(average(x))

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.experts._absorb(scale, shift)
