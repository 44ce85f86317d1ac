"""Convolutions for inference on a CPU: their weights packed once, the activation behind them within."""

from typing import Any

import torch
from timm.layers import activations
from torch import Tensor, nn

from timm_dynamic.ops.kernels import is_plain

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}  # which cannot be pickled


def _one(name: str, algorithm: str = ""):
    return lambda act: (name, [], algorithm)


# By exact type: oneDNN's name of an activation, its numbers, its algorithm.
FUSED = {
    nn.Identity: _one("none"),
    nn.ReLU: _one("relu"),
    nn.ReLU6: lambda act: ("hardtanh", [0.0, 6.0], ""),
    nn.Hardtanh: lambda act: ("hardtanh", [float(act.min_val), float(act.max_val)], ""),
    nn.LeakyReLU: lambda act: ("leaky_relu", [act.negative_slope], ""),
    nn.SiLU: _one("swish"),
    nn.Hardswish: _one("hardswish"),
    nn.Hardsigmoid: _one("hardsigmoid"),
    nn.Sigmoid: _one("sigmoid"),
    nn.Tanh: _one("tanh"),
    nn.GELU: lambda act: ("gelu", [], act.approximate),
    activations.Swish: _one("swish"),
    activations.HardSwish: _one("hardswish"),
    activations.HardSigmoid: _one("hardsigmoid"),
    activations.Sigmoid: _one("sigmoid"),
    activations.Tanh: _one("tanh"),
    activations.GELU: _one("gelu", "none"),
    activations.GELUTanh: _one("gelu", "tanh"),
}


class PackedConv2d(nn.Conv2d):
    """A convolution and the activation behind it, with the weight also as oneDNN wants it.

    The plain weight serves wherever the packed one cannot: under `torch.compile`, export, tracing and scripting, for
    other dtypes and devices, with gradients, and under autocast, transforms and modes that look at operators.
    It is packed again by `load_state_dict`, `to` and copying, not after other changes of the weight.

    Attributes:
        act: The activation.
        result_format: Memory format, of `FORMATS`, of what the packed weight gives; None: the plain weight serves.
        packed_for: The input's shape for which it is packed; others are right, too.
    """

    __jit_ignored_attributes__ = ["_packed"]
    result_format = None

    @classmethod
    def convert(cls, conv: nn.Conv2d, input_size: list[int]) -> None:
        """Make one of these of a convolution, in place; nothing is packed yet."""
        conv.__class__ = cls
        conv.act, conv.packed_for, conv._packed = nn.Identity(), input_size, None

    def use(self, result_format: str | None) -> None:
        """Run with the packed weight, or, for None, with the plain one."""
        self.result_format = result_format
        if self._packed is None:
            self.pack()

    def pack(self) -> None:
        """Pack the weight as it is now."""
        weight = self.weight.detach()
        self._packed = None
        if self.result_format is not None and weight.device.type == "cpu" and weight.dtype == torch.float32:
            how = (self.padding, self.stride, self.dilation, self.groups)
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *how, self.packed_for)
            self._packed = (weight, FUSED[type(self.act)](self.act))

    def forget_unused(self) -> None:
        """The packed weight, if the plain one is used for good."""
        if self.result_format is None:
            self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._can_run_packed(x):
                return self._run_packed(x)
        return self.act(self._conv_forward(x, self.weight, self.bias))

    @torch.jit.unused
    def _can_run_packed(self, x: Tensor) -> bool:
        return (
            self.result_format is not None
            and self._packed is not None
            and is_plain(x)
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and x.numel() > 0
            and not (x.requires_grad and torch.is_grad_enabled())
            and not self.act._forward_hooks
            and not self.act._forward_pre_hooks
        )

    @torch.jit.unused
    def _run_packed(self, x: Tensor) -> Tensor:
        weight, activation = self._packed
        if self.result_format == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        how = (self.padding, self.stride, self.dilation, self.groups)
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *how, *activation)
        return y.contiguous(memory_format=FORMATS[self.result_format])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # which cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self.pack()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()
