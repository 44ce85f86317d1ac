"""Dynamic convolution: attention over convolution kernels.

Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020 (arXiv 1912.03458). The operator is
`timm_dynamic.ops.mixed_conv2d`. Parameters are named as in T. Ardelean et al.'s implementation.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.layers.progress import Progress
from timm_dynamic.ops import mixed_conv2d
from timm_dynamic.ops._autocast import no_autocast
from timm_dynamic.ops._library import cuda_shortcut_serves, shortcut_serves
from timm_dynamic.ops.mixed_conv import mixed_pointwise_serves

# The softmax's temperature falls linearly from this to 1. Where epochs are known: from the first to the tenth.
_HOTTEST = 30.0
_EPOCHS = 10


def _annealed(epoch: float, epochs: float) -> float:
    return min(math.floor(epoch), _EPOCHS - 1) / (_EPOCHS - 1)


class KernelAttention(nn.Module):
    """How much of every kernel a sample gets: `softmax(MLP(GAP(x)) / temperature)`, section 3.2 of the paper.

    Computed in float32, or float64 for float64 inputs: float16 cannot hold the scores of large activations.

    Args:
        in_channels: C.
        num_kernels: N.
        reduction: The hidden layer is `C // reduction` wide, at least 1.

    Shape:
        `[B, C, H, W]` to `[B, N]`.
    """

    def __init__(self, in_channels: int, num_kernels: int, reduction: int, device=None, dtype=None):
        super().__init__()
        hidden = max(1, in_channels // reduction)
        dd = {"device": device, "dtype": dtype}
        self.to_scores = nn.Sequential(
            nn.Linear(in_channels, hidden, **dd), nn.ReLU(inplace=True), nn.Linear(hidden, num_kernels, **dd)
        )

    def forward(self, x: Tensor, temperature: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():
            squeeze, _, expand = self.to_scores
            parameters = (squeeze.weight, squeeze.bias, expand.weight, expand.bias)
            # Not to wait for a GPU that knows the temperature.
            on_gpu = temperature is None and cuda_shortcut_serves(x, *parameters)
            if on_gpu or shortcut_serves(x, *parameters):
                number = 1.0 if temperature is None else float(temperature)
                return torch.ops.timm_dynamic.kernel_attention(x, *parameters, number)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        squeeze, expand = self.to_scores[0], self.to_scores[2]
        # The gradient of a sum, unlike that of a mean, is an expanded view: no tensor of the size of x.
        scores = x.sum((2, 3), dtype=dtype) / (x.shape[2] * x.shape[3])
        scores = F.relu(F.linear(scores, squeeze.weight.to(dtype), squeeze.bias.to(dtype)))
        scores = F.linear(scores, expand.weight.to(dtype), expand.bias.to(dtype))
        return F.softmax(scores if temperature is None else scores / temperature, 1)


@register_notrace_module
class DynamicConv2d(DropInConv2d):
    """Convolution with a mixture of `num_kernels` kernels and biases, one for each sample; replaces an `nn.Conv2d`.

    `W(x) = sum_n pi_n(x) W_n` with the attention `pi(x)` of `KernelAttention`; the same for the bias.

    The temperature of its softmax is 1. It can fall from 30 to 1 in training, by epochs (`timm_dynamic.set_progress`)
    or by training forwards (a model's `anneal_steps`); evaluation then uses the current value.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: Those of
            `nn.Conv2d`.
        num_kernels: N.
        reduction: Of the attention's hidden layer, `in_channels // reduction` wide and at least 1.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    routing_limit = None  # it sums to 1

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
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        for name, value in (("num_kernels", num_kernels), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_kernels = num_kernels
        # What the convolution pads by itself, and what F.pad has to do before: [left, right, top, bottom].
        pads = _paddings(self.padding, self.kernel_size, self.dilation)
        explicit = padding_mode != "zeros" or any(before != after for before, after in pads)
        self._padding = (0, 0) if explicit else (pads[0][0], pads[1][0])
        self._explicit_padding = [*pads[1], *pads[0]] if explicit else None

        dd = {"device": device, "dtype": dtype}
        kernel_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.kernels_weights = nn.Parameter(torch.empty(num_kernels, *kernel_shape, **dd))
        self.kernels_bias = nn.Parameter(torch.empty(num_kernels, out_channels, **dd)) if bias else None
        self.attention = KernelAttention(in_channels, num_kernels, reduction, **dd)
        self.progress, self.number = Progress(True, _annealed, device), 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every kernel and bias as `nn.Conv2d` would have them."""
        bound = self.kernels_weights[0, 0].numel() ** -0.5
        nn.init.uniform_(self.kernels_weights, -bound, bound)
        if self.kernels_bias is not None:
            nn.init.uniform_(self.kernels_bias, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **kwargs) -> "DynamicConv2d":
        """Build the layer that replaces `conv`; its kernels are that of `conv`, a little noise apart, its biases equal.

        Without the noise (1e-4 of the weight's standard deviation) the kernels would stay equal in training.

        Args:
            conv: A convolution with `nn.Conv2d`'s own forward.
            **kwargs: `num_kernels`, `reduction`.

        Raises:
            ValueError: If `conv` has another forward than `nn.Conv2d`.
        """
        layer = super().from_conv(conv, **kwargs)
        with torch.no_grad():
            noise = torch.randn_like(layer.kernels_weights) * conv.weight.std(correction=0)
            layer.kernels_weights.copy_(conv.weight + 1e-4 * noise).requires_grad_(conv.weight.requires_grad)
        return layer

    @property
    def weight(self) -> Tensor:
        """The kernels, `[num_kernels, out_channels, in_channels / groups, *kernel_size]`."""
        return self.kernels_weights  # some of timm's modules ask a convolution's weight for its dtype and device

    @property
    def bias(self) -> Tensor | None:
        """The biases, `[num_kernels, out_channels]`."""
        return self.kernels_bias

    def _apply(self, fn, recurse: bool = True):
        # `Module.to(memory_format=torch.channels_last)` breaks on five dimensions. The kernels stay contiguous.
        return super()._apply(lambda t: fn(t.flatten(0, 1)).contiguous().view_as(t) if t.ndim == 5 else fn(t), recurse)

    def temperature(self) -> Tensor | None:
        """Of the attention's softmax, now; None: 1, and nobody has asked for another one."""
        return _HOTTEST + (1 - _HOTTEST) * self.progress(self.training) if self.progress.known else None

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the attention, `[B, num_kernels]`, with which `forward` mixes the kernels."""
        with no_autocast(x):
            return self.attention(x, self.temperature())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], got shape {list(x.shape)}")
        if self.training:
            self.progress.count(self.number)
        if torch.jit.is_scripting():
            attention = self.attention(x, self.temperature())
            bias = torch.jit.annotate(Tensor | None, None)
            if self.kernels_bias is not None:
                bias = torch.matmul(attention, self.kernels_bias.to(attention.dtype))
        else:
            with no_autocast(x):
                attention = self.attention(x, self.temperature())
                bias = None
                if self.kernels_bias is not None:
                    bias = torch.matmul(attention, self.kernels_bias.to(attention.dtype))
        if self._explicit_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._explicit_padding, mode)
        options = (self.stride, self._padding, self.dilation, self.groups)
        if torch.jit.is_scripting():
            y = torch.ops.timm_dynamic.mixed_conv2d(x, attention, self.kernels_weights, *options)
        else:
            y = mixed_conv2d(x, attention, self.kernels_weights, *options)
        return y if bias is None else y + bias[:, :, None, None].to(y.dtype)

    @torch.jit.unused
    def forward_normed(self, x: Tensor, norm: tuple[Tensor, Tensor, float, float]) -> Tensor | None:
        """What `timm_dynamic.ops.affine_` makes of the output, or None: where this is no faster than both in turn.

        Args:
            x: Such that `inference_kernel_serves`.
            norm: Scale, shift and limits.
        """
        kernels = self.kernels_weights
        plain = self.kernels_bias is None and self._explicit_padding is None
        pointwise = (*self.kernel_size, *self.stride, *self._padding, self.groups) == (1, 1, 1, 1, 0, 0, 1)
        if not (plain and pointwise and mixed_pointwise_serves(x, kernels)):
            return None
        attention = self.attention(x, self.temperature())
        return torch.ops.timm_dynamic.mixed_pointwise(x.contiguous(), attention, kernels, *norm)


def _paddings(
    padding: str | tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> list[tuple[int, int]]:
    """Padding before and after, vertically and horizontally."""
    if padding == "valid":
        return [(0, 0), (0, 0)]
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in padding]
