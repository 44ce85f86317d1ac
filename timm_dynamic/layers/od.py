"""Omni-dimensional dynamic convolution: attention over kernels, and gates of inputs, outputs and taps.

Li, Zhou and Yao, "Omni-Dimensional Dynamic Convolution", ICLR 2022 (arXiv 2209.07947). The attention's parts are named
as the authors', whose 1x1 convolutions of pooled features are linear layers here.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.absorbed_norms import fold
from timm_dynamic.layers.base import check_positive, parts_of
from timm_dynamic.layers.kernel_attention import OmniAttention
from timm_dynamic.layers.kernel_mixture import KernelMixture
from timm_dynamic.layers.progress import Progress
from timm_dynamic.ops import mixed_conv2d
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.sample_conv.samples import around_mean
from timm_dynamic.ops.sample_conv.table import OMNI

# The temperature falls linearly from this to 1. Where epochs are known: in the first ten.
_HOTTEST = 30.0
_EPOCHS = 10


def _annealed(epoch: float, epochs: float) -> float:
    return min(epoch / _EPOCHS, 1.0)


@register_notrace_module
class ODConv2d(KernelMixture):
    """Omni-dimensional dynamic convolution; takes the place of an `nn.Conv2d`.

        y = a_out * conv(a_in * x, sum_n pi_n a_tap * kernels_n)

    The gates `a_in` of all input channels, `a_tap` and `a_out` are sigmoids, and `pi` is a softmax, of linear functions
    of a hidden vector: the average-pooled input after a linear layer, a batch norm and a ReLU. Where inputs and outputs
    are the same (a depthwise convolution) there is no `a_out`; a 1x1 kernel has no `a_tap`, a single kernel no `pi`.

    All of these functions are divided by a temperature, which is 1. It can fall from 30 to 1 in training, over ten
    epochs (`timm_dynamic.set_progress`) or over training forwards (a model's `anneal_steps`); evaluation then uses the
    current value.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: As for `nn.Conv2d`.
        bias: A static one, added last. The authors' layers have none.
        num_kernels: N.
        reduction: The hidden vector has this share of the input's channels, at least 16.
        neutral_gates: Gates are `2 * sigmoid`, and `kernels` holds the mean of the kernels, and how far all but the
            first one are from it. `from_conv` sets it; the authors' networks do without.

    Shape:
        As for `nn.Conv2d`; the input must be batched. A batch of one is normalised with running statistics.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "od"
    exact = {"neutral_gates": True}
    implementations = OMNI
    reference_names = {"weight": "kernels"}

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
        num_kernels: int = 4,
        reduction: float = 1 / 16,
        neutral_gates: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(num_kernels=num_kernels)
        if not 0 < reduction <= 1:
            raise ValueError(f"reduction must be a share, above 0 and at most 1, got {reduction}")
        self.num_kernels, self.reduction, self.neutral_gates = num_kernels, reduction, neutral_gates
        self.routing_limit = 2.0 if neutral_gates else 1.0
        self.hottest = _HOTTEST  # for TorchScript
        dd = {"device": device, "dtype": dtype}
        shape, taps = (out_channels, in_channels // groups, *self.kernel_size), math.prod(self.kernel_size)
        self.kernels = nn.Parameter(torch.empty(num_kernels, *shape, **dd))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **dd)) if bias else None)
        outputs = 0 if groups == in_channels == out_channels else out_channels
        sizes = (outputs, taps if taps > 1 else 0, num_kernels if num_kernels > 1 else 0)
        self.attention = OmniAttention(in_channels, max(int(in_channels * reduction), 16), *sizes, **dd)
        self.parts = parts_of("attention", self.attention)
        self.progress, self.number = Progress(True, _annealed, device), 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: normal, by the fan-out."""
        linears = [part for part in self.attention.children() if isinstance(part, nn.Linear)]
        for weight in (*self.kernels, *(linear.weight for linear in linears)):
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        for bias in (self.bias, *(linear.bias for linear in linears)):
            if bias is not None:
                nn.init.zeros_(bias)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """The mean of the kernels is that of `conv`, and all heads are zero: until trained, the output is `conv`'s.

        The kernels differ by noise of a tenth of the weight's standard deviation, without which they would stay equal.
        """
        heads = [head for head in self.attention.heads() if head is not None]
        for head in heads:
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        kernels = 0.1 * torch.randn_like(self.kernels) * conv.weight.std(correction=0)
        if self.neutral_gates:
            kernels[0] = conv.weight
            nn.init.constant_(self.attention.bn.weight, 0.1)  # else the gates' first steps outpace the kernel's
        else:
            gates = len(heads) - (self.num_kernels > 1)
            kernels += 2**gates * conv.weight - kernels.mean(0)
        self.kernels.copy_(kernels).requires_grad_(conv.weight.requires_grad)

    def temperature(self) -> Tensor:
        """Of all scores, now."""
        return self.progress.between(self.hottest, 1.0)

    def formula(self, x: Tensor) -> Tensor:
        if self.training and not torch.jit.is_scripting():
            self.progress.count(self.number)
        pi, a_in, a_tap, a_out = self.factors_of(average(x))
        options = (self.stride, self.zero_padding, self.dilation, self.groups)
        y = mixed_conv2d(self.pad(x), pi, self.kernels, *options, a_in=a_in, a_tap=a_tap, a_out=a_out)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def factors(self, pooled: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """What the entries of `kernels` are multiplied by, and the gates of inputs, taps and outputs."""
        inputs, outputs, taps, kernels = self.attention(pooled.to(self.kernels.dtype))
        temperature = self.temperature()
        pi = None if kernels is None else self.coefficients(F.softmax(kernels / temperature, 1))
        a_tap = None if taps is None else self.gate(taps / temperature)
        a_out = None if outputs is None else self.gate(outputs / temperature)
        return pi, self.gate(inputs / temperature), a_tap, a_out

    def coefficients(self, attention: Tensor) -> Tensor:
        """What the entries of `kernels` are multiplied by, `[B, num_kernels]`."""
        return around_mean(attention, torch.ones_like(attention[:, :1])) if self.neutral_gates else attention

    def gate(self, scores: Tensor) -> Tensor:
        gates = torch.sigmoid(scores)
        return 2 * gates if self.neutral_gates else gates

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the gates of inputs, taps and outputs one after the other, as far as there are."""
        return torch.cat([gates for gates in self.factors_of(average(x))[1:] if gates is not None], 1)

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.kernels.mul_(scale[:, None, None, None])
        self.bias = nn.Parameter(shift.to(self.kernels) if self.bias is None else self.bias * scale + shift)
        fold(self, "attention.fc", "attention.bn")
