"""Dynamic convolution: attention over convolution kernels.

Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020 (arXiv 1912.03458). Parameters are
named as in T. Ardelean et al.'s implementation.
"""

import math

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import check_positive, draw_as_conv
from timm_dynamic.layers.kernel_attention import KernelAttention
from timm_dynamic.layers.kernel_mixture import KernelMixture
from timm_dynamic.layers.progress import Progress
from timm_dynamic.layers.stand_in import stand_in_bias
from timm_dynamic.ops import mixed_conv2d
from timm_dynamic.ops.sample_conv.samples import around_mean
from timm_dynamic.ops.sample_conv.table import MIXED

# The softmax's temperature falls linearly from this to 1. Where epochs are known: from the first to the tenth.
_HOTTEST = 30.0
_EPOCHS = 10


def _annealed(epoch: float, epochs: float) -> float:
    return min(math.floor(epoch), _EPOCHS - 1) / (_EPOCHS - 1)


@register_notrace_module
class DynamicConv2d(KernelMixture):
    """Convolution with a mixture of `num_kernels` kernels and biases, one for each sample; replaces an `nn.Conv2d`.

    `W(x) = sum_n pi_n(x) W_n` with the attention `pi(x)` of `KernelAttention`; the same for the bias.

    The temperature of its softmax is 1. It can fall from 30 to 1 in training, by epochs (`timm_dynamic.set_progress`)
    or by training forwards (a model's `anneal_steps`); evaluation then uses the current value.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: Those of
            `nn.Conv2d`.
        num_kernels: N.
        reduction: Of the attention's hidden layer, `in_channels // reduction` wide and at least 1.
        around_mean: `kernels_weights` and `kernels_bias` hold the mean of the kernels, and how far all but the first
            one are from it: where the attention is even, the layer learns as a convolution with the mean kernel does,
            not at the pace of a kernel that takes part in 1/N. `from_conv` sets it; the authors' networks do without.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "dy"
    exact = {"around_mean": True}
    implementations = MIXED
    parts = (
        *((KernelAttention, "attention"), (nn.Sequential, "attention.to_scores")),
        *((nn.Linear, "attention.to_scores.0"), (nn.ReLU, "attention.to_scores.1")),
        (nn.Linear, "attention.to_scores.2"),
    )
    routing_limit = None  # it sums to 1
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
        num_kernels: int = 4,
        reduction: int = 4,
        around_mean: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(num_kernels=num_kernels, reduction=reduction)
        self.num_kernels, self.around_mean = num_kernels, around_mean
        self.hottest = _HOTTEST  # for TorchScript
        dd = {"device": device, "dtype": dtype}
        kernel_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.kernels_weights = nn.Parameter(torch.empty(num_kernels, *kernel_shape, **dd))
        self.kernels_bias = nn.Parameter(torch.empty(num_kernels, out_channels, **dd)) if bias else None
        self.attention = KernelAttention(in_channels, num_kernels, reduction, **dd)
        self.progress, self.number = Progress(True, _annealed, device), 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every kernel and bias as `nn.Conv2d` would have them."""
        draw_as_conv(self.kernels_weights[0, 0].numel(), self.kernels_weights, self.kernels_bias)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """All kernels are that of `conv`, and differ by a little noise, without which they would stay equal.

        The noise is 1e-4 of the weight's standard deviation. Kernels around their mean have `conv`'s as the mean, and
        an attention that is nearly even, as it is in the authors' training at first: else what the deviations learn,
        with Adam at the full pace, would come on top.
        """
        noise = 1e-4 * torch.randn_like(self.kernels_weights) * conv.weight.std(correction=0)
        targets = [(self.kernels_weights, conv.weight, noise)]
        if conv.bias is not None:
            targets.append((self.kernels_bias, conv.bias, torch.zeros_like(self.kernels_bias)))
        for kernels, kernel, apart in targets:
            kernels.copy_(apart).requires_grad_(kernel.requires_grad)
            if self.around_mean:
                kernels[0] = kernel
            else:
                kernels.add_(kernel)
        if self.around_mean:
            for parameter in self.attention.to_scores[2].parameters():
                parameter.div_(_HOTTEST)

    @stand_in_bias
    def bias(self) -> Tensor | None:
        """That of an even mixture, `[out_channels]`."""
        biases = self.kernels_bias
        return biases if biases is None else biases[0] if self.around_mean else biases.mean(0)

    def temperature(self) -> Tensor:
        """Of the attention's softmax, now."""
        return self.progress.between(self.hottest, 1.0, self.training)

    def formula(self, x: Tensor) -> Tensor:
        if self.training and not torch.jit.is_scripting():
            self.progress.count(self.number)
        coefficients = self.coefficients(self.attention(x, self.temperature()))
        options = (self.stride, self.zero_padding, self.dilation, self.groups)
        y = mixed_conv2d(self.pad(x), coefficients, self.kernels_weights, *options)
        if self.kernels_bias is None:
            return y
        bias = torch.sum(coefficients[:, :, None] * self.kernels_bias, 1)  # not a product: autocast would cast it
        return y + bias[:, :, None, None].to(y.dtype)

    def coefficients(self, attention: Tensor) -> Tensor:
        """What the entries of `kernels_weights` are multiplied by, `[B, num_kernels]`."""
        if not self.around_mean:
            return attention
        return around_mean(attention, attention.new_ones(attention.shape[0], 1))

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the attention, `[B, num_kernels]`, with which `forward` mixes the kernels."""
        return self.attention(x, self.temperature())

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.kernels_weights.mul_(scale[:, None, None, None])
        if self.kernels_bias is None:
            self.kernels_bias = nn.Parameter(torch.zeros_like(self.kernels_weights[:, :, 0, 0, 0]))
        self.kernels_bias.mul_(scale)
        (self.kernels_bias[0] if self.around_mean else self.kernels_bias).add_(shift)
