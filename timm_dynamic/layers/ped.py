"""Parameter-efficient dynamic convolution: a weight that every sample scales by output, by input and by tap.

Hou and Kung, "Parameter Efficient Dynamic Convolution via Tensor Decomposition", BMVC 2021. The convolution itself is
`timm_dynamic.ops.factored_conv2d`. Parameters are named as the authors' are, so that their weights load as they are.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.auxiliary import attach_loss, warn_about_float16
from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.ops import factored_conv2d
from timm_dynamic.ops._autocast import no_autocast
from timm_dynamic.ops._library import cuda_shortcut_serves, fuses_few, shortcut_serves

RECONSTRUCTION_WEIGHT = 0.001


class _Linear(nn.Linear):
    """In the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _Gates(nn.Module):
    """The average-pooled input to the gates of inputs, outputs and taps, before the sigmoid; in training, also back."""

    def __init__(self, pooled: int, inputs: int, outputs: int, taps: int, rank: int, reduction: int, **dd):
        super().__init__()
        hidden = max(1, pooled // reduction)
        self.fc_share = _Linear(pooled, hidden, **dd)
        self.fc_inp = _Linear(hidden, inputs * rank, **dd)
        self.fc_oup = _Linear(hidden, outputs * rank, **dd)
        self.fc_k = _Linear(hidden, taps * rank, **dd)
        self.decoder = nn.Sequential(
            _Linear((inputs + outputs + taps) * rank, hidden, **dd), nn.ReLU(), _Linear(hidden, pooled, **dd)
        )

    def forward(self, pooled: Tensor) -> list[Tensor]:
        hidden = F.relu(self.fc_share(pooled))
        return [self.fc_inp(hidden), self.fc_oup(hidden), self.fc_k(hidden)]

    def gates(self, logits: list[Tensor]) -> list[Tensor]:
        return [torch.sigmoid(z) for z in logits]

    @torch.jit.unused
    def parameters_of_heads(self) -> list[Tensor]:
        """As `torch.ops.timm_dynamic.factored_gates` takes them."""
        layers = (self.fc_share, self.fc_inp, self.fc_oup, self.fc_k)
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]

    def reconstruct(self, logits: list[Tensor]) -> Tensor:
        return self.decoder(torch.cat(logits, 1))


@register_notrace_module
class PEDConv2d(DropInConv2d):
    """Parameter-efficient dynamic convolution; takes the place of an `nn.Conv2d`.

    The weight of a sample is

        W(x)[o,i,k] = weight[o,i,k] * sum_r a_out[o,r] * a_in[i,r] * a_tap[k,r]

    Its gates are sigmoids of linear functions of a hidden vector, itself a linear function, with a ReLU, of the
    average-pooled input. With groups, all of them share `a_in`. Ranks above 1 are the CP form.

    In training, Gaussian noise is added before the sigmoids, and a decoder reconstructs the average-pooled input
    (detached) from the noisy values. The mean squared error, weighted 0.001, is part of the training loss: its gradient
    is attached to the gates (see `timm_dynamic.layers.attach_loss`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: As for `nn.Conv2d`.
        bias: A static one, added last.
        rank: Number of terms of the gates.
        reduction: The hidden vector has 1/reduction of the input's channels, at least 1.
        noise_std: Standard deviation of the noise in training; 0 draws no random numbers.
        aux_scale: Factor of the reconstruction loss's gradient: 1 over the number of forwards per optimizer step. A
            `timm_dynamic.training.DynamicTask` puts a tensor of its own here.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    auxiliary_terms = ("reconstruction",)  # buffers, for `timm_dynamic.auxiliary_loss`
    routing_limit = 1.0

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
        rank: int = 1,
        reduction: int = 16,
        noise_std: float = 0.1,
        aux_scale: float = 1.0,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        for name, value in (("rank", rank), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in (("noise_std", noise_std), ("aux_scale", aux_scale)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.rank, self.reduction, self.noise_std, self.aux_scale = rank, reduction, noise_std, aux_scale
        dd = {"device": device, "dtype": dtype}
        inputs, taps = in_channels // groups, math.prod(self.kernel_size)
        self.weight = nn.Parameter(torch.empty(out_channels, inputs, *self.kernel_size, **dd))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **dd)) if bias else None)
        self.attn = _Gates(in_channels, inputs, out_channels, taps, rank, reduction, **dd)
        # Of the last training forward, weighted; written in place, as torch.compile and checkpointing like it best.
        self.register_buffer("reconstruction", torch.zeros((), **dd), persistent=False)
        self.reset_parameters()

    reset_parameters = nn.Conv2d.reset_parameters  # of weight and bias

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **kwargs) -> "PEDConv2d":
        """Build the layer that replaces `conv`, with its bias and its weight times 8/rank.

        The gates' linear layers are zero: until they are trained, every gate is 1/2 and the output, noise aside, that
        of `conv`.

        Args:
            conv: A convolution with `nn.Conv2d`'s own forward.
            **kwargs: `rank`, `reduction`, `noise_std`, `aux_scale`.

        Raises:
            ValueError: If `conv` has another forward.
        """
        layer = super().from_conv(conv, **kwargs)
        with torch.no_grad():
            layer.weight.copy_(conv.weight * (8 / layer.rank)).requires_grad_(conv.weight.requires_grad)
            for head in (layer.attn.fc_inp, layer.attn.fc_oup, layer.attn.fc_k):
                head.weight.zero_()
                head.bias.zero_()
        return layer

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the gates of inputs, outputs and taps one after the other, without noise."""
        with no_autocast(x):
            return torch.sigmoid(torch.cat(self.attn(_pool(x)), 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], got shape {list(x.shape)}")
        if torch.jit.is_scripting():
            return self._convolve(x, self.attn.gates(self.attn(_pool(x))))
        else:
            return self._dynamic(x)

    def _dynamic(self, x: Tensor) -> Tensor:
        if not self.training:
            heads = self.attn.parameters_of_heads()
            if shortcut_serves(x, self.weight, *heads) or cuda_shortcut_serves(x, *heads):
                return self._convolve(x, torch.ops.timm_dynamic.factored_gates(x, *heads))
        with no_autocast(x):
            pooled = _pool(x)
            logits = self.attn(pooled)
            if self.training:
                if self.noise_std > 0:
                    logits = [z + self.noise_std * torch.randn_like(z) for z in logits]
                loss = F.mse_loss(self.attn.reconstruct(logits), pooled.detach(), reduction="sum")
                loss = loss / max(pooled.numel(), 1)  # an empty batch has no mean
                self.reconstruction.copy_(RECONSTRUCTION_WEIGHT * loss.detach())
                # Not to the output: autograd would forbid an activation that overwrites it, as in VGG.
                logits[0] = attach_loss(logits[0], loss, RECONSTRUCTION_WEIGHT, self.aux_scale)
            gates = self.attn.gates(logits)
        y = self._convolve(x, gates)
        if self.training and y.dtype == torch.float16 and not torch.compiler.is_compiling():
            if not isinstance(self.aux_scale, Tensor):
                warn_about_float16("PED's reconstruction loss")
        return y

    @torch.jit.unused
    def forward_normed(self, x: Tensor, norm: tuple[Tensor, Tensor, float, float]) -> Tensor | None:
        """What `timm_dynamic.ops.affine_` makes of the output, or None: where this is no faster than both in turn.

        Args:
            x: Such that `inference_kernel_serves`.
            norm: Scale, shift and limits.
        """
        few = 4 * x.shape[2] * x.shape[3] <= self.out_channels  # columns are scaled then
        if len(x) != 1 or self.rank != 1 or few or x.device.type != "cpu":
            return None
        weight, heads = self.weight, self.attn.parameters_of_heads()
        if not fuses_few(x, weight, *heads):
            return None
        a_in, a_out, a_tap = torch.ops.timm_dynamic.factored_gates(x, *heads)
        own = weight * torch.outer(a_in[0], a_tap[0]).view(weight.shape[1:])
        y = F.conv2d(self.pad(x), own, None, self.stride, self.zero_padding, self.dilation, self.groups)
        y = y.contiguous()  # it is not where a 1x1 weight has been put into channels_last
        y.mul_(a_out[0, :, None, None])  # not with the norm's scale, which would give other bits
        if self.bias is not None:
            y.add_(self.bias[:, None, None])
        torch.ops.timm_dynamic.affine_(y, *norm)
        return y

    def _convolve(self, x: Tensor, gates: list[Tensor]) -> Tensor:
        a_in, a_out, a_tap = [gate.unflatten(1, (-1, self.rank)) for gate in gates]
        arguments = (self.pad(x), self.weight, a_in, a_tap, a_out, self.stride, self.zero_padding, self.dilation)
        if torch.jit.is_scripting():  # TorchScript knows the registered operator, not the function around it
            y = torch.ops.timm_dynamic.factored_conv2d(*arguments, self.groups)[0]
        else:
            y = factored_conv2d(*arguments, self.groups)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)


def _pool(x: Tensor) -> Tensor:
    """`[B, C]`, in float32 or wider: large activations do not fit into float16, nor do the heads' sums of them."""
    return x.mean((2, 3), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
