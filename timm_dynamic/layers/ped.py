"""Parameter-efficient dynamic convolution: a weight that every sample scales by output, by input and by tap.

Hou and Kung, "Parameter Efficient Dynamic Convolution via Tensor Decomposition", BMVC 2021; parameters have its names.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.auxiliary import attach_loss, store, warn_about_float16
from timm_dynamic.layers.base import DropInConv2d, check_positive, copy_weight, draw_as_conv, in_dtype_of
from timm_dynamic.layers.progress import State
from timm_dynamic.ops import mixed_conv2d
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.precision import autocast_dtype, no_autocast
from timm_dynamic.ops.sample_conv.table import GATED

RECONSTRUCTION_WEIGHT = 0.001


class Heads(nn.Module):
    """The average-pooled input to the values of the gates of inputs, outputs and taps; in training, also back."""

    def __init__(self, pooled: int, inputs: int, outputs: int, taps: int, hidden: int, **dd):
        super().__init__()
        self.fc_share = nn.Linear(pooled, hidden, **dd)
        self.fc_inp = nn.Linear(hidden, inputs, **dd)
        self.fc_oup = nn.Linear(hidden, outputs, **dd)
        self.fc_k = nn.Linear(hidden, taps, **dd)
        first, last = nn.Linear(inputs + outputs + taps, hidden, **dd), nn.Linear(hidden, pooled, **dd)
        self.decoder = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, pooled: Tensor) -> list[Tensor]:
        hidden = F.relu(self.fc_share(pooled))
        return [self.fc_inp(hidden), self.fc_oup(hidden), self.fc_k(hidden)]


@register_notrace_module
class PEDConv2d(State, DropInConv2d):
    """Parameter-efficient dynamic convolution; takes the place of an `nn.Conv2d`.

    The weight of a sample is

        W(x)[o,i,k] = kernel[o,i,k] * sum_r a_out[o,r] * a_in[i,r] * a_tap[k,r]

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
            `timm_dynamic.training.DynamicTask` puts a tensor here.
        neutral_gates: Gates are `2 * sigmoid`, and the terms averaged, not summed: `kernel` is the weight of a sample
            whose gates' linear layers give 0. `from_conv` sets it; the authors' networks do without.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "ped"
    exact = {"neutral_gates": True}
    reference_names = {"weight": "kernel"}
    implementations = GATED
    parts = ((Heads, "attn"), *((nn.Linear, f"attn.{name}") for name in ("fc_share", "fc_inp", "fc_oup", "fc_k")))
    auxiliary_terms = ("reconstruction",)  # buffers, for `timm_dynamic.auxiliary_loss`

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
        neutral_gates: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(rank=rank, reduction=reduction)
        for name, value in (("noise_std", noise_std), ("aux_scale", aux_scale)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.rank, self.reduction, self.noise_std, self.aux_scale = rank, reduction, noise_std, aux_scale
        self.neutral_gates, self.routing_limit = neutral_gates, 2.0 if neutral_gates else 1.0
        dd = {"device": device, "dtype": dtype}
        inputs, taps = in_channels // groups, math.prod(self.kernel_size)
        self.kernel = nn.Parameter(torch.empty(out_channels, inputs, *self.kernel_size, **dd))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **dd)) if bias else None)
        sizes = (in_channels, inputs * rank, out_channels * rank, taps * rank, max(1, in_channels // reduction))
        self.attn = Heads(*sizes, **dd)
        self.register_state("reconstruction", torch.zeros((), dtype=dtype, device="cpu"), device)  # the last, weighted
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernel and bias as `nn.Conv2d` has them."""
        draw_as_conv(self.kernel[0].numel(), self.kernel, self.bias)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """The gates' linear layers are zero: until they are trained, the output, noise aside, is that of `conv`."""
        copy_weight(conv, self.kernel)
        if not self.neutral_gates:
            self.kernel.mul_(8 / self.rank)
        for head in (self.attn.fc_inp, self.attn.fc_oup, self.attn.fc_k):
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)

    def formula(self, x: Tensor) -> Tensor:
        a_in, a_out, a_tap = self.factors_of(average(x))
        if not torch.jit.is_scripting() and self.training:
            warn_about_float16(autocast_dtype(x), self.aux_scale, "PED's reconstruction loss")
        weight, padded, rank = self.kernel[None], self.pad(x), self.rank
        options = (self.stride, self.zero_padding, self.dilation, self.groups)
        y = mixed_conv2d(padded, None, weight, *options, a_in=a_in[0], a_tap=a_tap[0], a_out=a_out[0])
        for r in range(1, rank):
            y = y + mixed_conv2d(padded, None, weight, *options, a_in=a_in[r], a_tap=a_tap[r], a_out=a_out[r])
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def factors(self, pooled: Tensor) -> list[Tensor]:
        """Gates of inputs, outputs and taps, `[rank, B, n]` each; of their products, those of all ranks are added."""
        if torch.jit.is_scripting():
            values = self.attn(pooled.to(self.kernel.dtype))
        else:
            values = in_dtype_of(pooled, self.attn)
            if self.training:
                values = self._vary(values, pooled)
        gates = [self.gate(z).unflatten(1, (-1, self.rank)).permute(2, 0, 1) for z in values]
        if self.neutral_gates and self.rank > 1:
            gates[1] = gates[1] / self.rank
        return gates

    def gate(self, z: Tensor) -> Tensor:
        return 2 * torch.sigmoid(z) if self.neutral_gates else torch.sigmoid(z)

    @torch.jit.unused
    def _vary(self, values: list[Tensor], pooled: Tensor) -> list[Tensor]:
        """Noise, and what the reconstruction loss adds to the gradient."""
        if self.noise_std > 0:
            values = [z + self.noise_std * torch.randn_like(z) for z in values]
        decoded = in_dtype_of(torch.cat(values, 1), self.attn.decoder)
        loss = F.mse_loss(decoded, pooled.detach(), reduction="sum") / max(pooled.numel(), 1)  # empty: has no mean
        store(self.reconstruction, RECONSTRUCTION_WEIGHT * loss)
        # Not to the output: autograd would forbid an activation that overwrites it, as in VGG.
        return [attach_loss(values[0], loss, RECONSTRUCTION_WEIGHT, self.aux_scale), *values[1:]]

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the gates of inputs, outputs and taps one after the other, without noise."""
        with no_autocast(x):
            return self.gate(torch.cat(in_dtype_of(average(x), self.attn), 1))

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.kernel.mul_(scale[:, None, None, None])
        self.bias = nn.Parameter(shift.to(self.kernel) if self.bias is None else self.bias * scale + shift)
