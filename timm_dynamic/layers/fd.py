"""Frequency dynamic convolution: a kernel's spectrum, whose frequencies every sample weighs in groups.

Chen et al., "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025 (arXiv 2503.18783). Parameters and
parts are named as the authors'. This is the layer with all that they switch on by default.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import AffineOutputs, check_positive, in_dtype_of
from timm_dynamic.layers.fd_parts import BandModulation, GlobalGates, LocalGates, with_real_edges
from timm_dynamic.layers.stand_in import conv_weight_shape
from timm_dynamic.ops import sample_conv2d
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.precision import accumulation_dtype, no_autocast

_MOST_KERNELS = 64


@register_notrace_module
class FDConv2d(AffineOutputs):
    """Frequency dynamic convolution; takes the place of an `nn.Conv2d`.

        W(x) = a_out(x) * a_in(x) * a_tap(x) * a(x) * irfft2(sum_g kappa_g(x) * [frequencies of group g] * dft_weight)

    The kernel is the inverse Fourier transform of `dft_weight`, the half spectrum of a matrix of `O * Kh` rows and
    `I * Kw` columns. A sample's gates, all of them `2 * sigmoid` of functions of the average-pooled input, multiply the
    spectrum, one for each group of frequencies, and the kernel: by input, output and tap, and entry by entry. A 3x3
    convolution reads the input with its frequency bands weighed.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode: As for `nn.Conv2d`, with at
            least two channels, and an even number of columns.
        groups: 1.
        bias: A static one, added last.
        num_kernels: The number of groups of frequencies, equally large ones; by default the largest one up to 64.
        reduction: The gates' hidden layer is `in_channels * reduction` wide and at least 16.
        band_modulation: Weigh the input's bands; by default before 3x3 kernels.
        orthonormal: Scale the spectrum so that the kernel learns at the pace of one that is a parameter itself.
            `from_conv` sets it; the authors' networks do without.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Attributes:
        frequency_group: A buffer, `[O * Kh, I * Kw // 2 + 1]`: the group of each frequency, by its distance from 0,
            equal ones in row-major order. The authors sort in floating point, by which equal ones come in an order that
            depends on the machine, and their checkpoints do not have it: set it where it is known.

    Raises:
        ValueError: If an argument has an unusable value, or the convolution is none that it can be; in the forward
            pass, if the input has.
    """

    family = "fd"
    exact = {"orthonormal": True}
    routing_limit = 2.0

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
        num_kernels: int | None = None,
        reduction: float = 1 / 16,
        band_modulation: bool | None = None,
        orthonormal: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(num_kernels=num_kernels)
        if not reduction > 0:
            raise ValueError(f"reduction must be positive, got {reduction}")
        self.rows, self.columns = out_channels * self.kernel_size[0], in_channels * self.kernel_size[1]
        if groups != 1 or min(in_channels, out_channels) < 2 or self.columns % 2:
            raise ValueError(
                "FDConv needs groups=1, two or more channels, and an even in_channels * kernel width: got "
                f"groups={groups}, {in_channels} to {out_channels} channels and a kernel of {self.kernel_size}"
            )
        dd, frequencies = {"device": device, "dtype": dtype}, self.rows * (self.columns // 2 + 1)
        groups = num_kernels or max(n for n in range(1, _MOST_KERNELS + 1) if frequencies % n == 0)
        if frequencies % groups:
            raise ValueError(f"num_kernels must divide the {frequencies} frequencies of the kernel, got {num_kernels}")
        self.num_kernels = groups
        self.scale = math.sqrt(self.rows * self.columns / 2) if orthonormal else min(in_channels, out_channels) // 2
        self.add_outputs(bias, **dd)
        self.dft_weight = nn.Parameter(torch.empty(1, self.rows, self.columns // 2 + 1, 2, **dd))
        self.register_buffer("frequency_group", self.default_groups().to(device))
        taps, hidden = math.prod(self.kernel_size), max(int(in_channels * reduction), 16)
        self.KSM_Global = GlobalGates(in_channels, hidden, out_channels, taps, groups, **dd)
        modulated = self.kernel_size == (3, 3) if band_modulation is None else band_modulation
        self.FBM = BandModulation(in_channels, **dd) if modulated else None
        self.KSM_Local = LocalGates(in_channels, out_channels * taps, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The kernel as `nn.Conv2d` would have it, and gates of 1, nearly, but for those of outputs."""
        weight = torch.empty(conv_weight_shape(self), device=self.dft_weight.device, dtype=self.dft_weight.dtype)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.transform(weight)
        for linear in (self.KSM_Global.fc, *self.KSM_Global.heads()):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        for linear in self.gate_layers():
            if linear is not self.KSM_Global.filter_fc:
                nn.init.normal_(linear.weight, std=1e-6)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.constant_(self.KSM_Local.conv.weight, 1e-6)

    def gate_layers(self) -> list[nn.Module]:
        """The layers before the sigmoids."""
        bands = [] if self.FBM is None else list(self.FBM.freq_weight_conv_list)
        return [*self.KSM_Global.heads(), *bands, self.KSM_Local.conv]

    def default_groups(self) -> Tensor:
        """See `frequency_group`; the same on every machine, as integers are compared."""
        row = torch.arange(self.rows, device="cpu")[:, None]
        column = torch.arange(self.columns // 2 + 1, device="cpu")
        distance = (torch.minimum(row, self.rows - row) * self.columns) ** 2 + (column * self.rows) ** 2
        order = distance.flatten().sort(stable=True).indices
        groups = torch.empty_like(order)
        groups[order] = torch.arange(len(order), device="cpu") // (len(order) // self.num_kernels)
        return groups.view(distance.shape).to(torch.uint8 if self.num_kernels <= 256 else torch.int32)

    def transform(self, weight: Tensor) -> None:
        """Make `dft_weight` that of a kernel, `[O, I, Kh, Kw]`."""
        matrix = weight.permute(0, 2, 1, 3).reshape(self.rows, self.columns)
        spectrum = torch.fft.rfft2(matrix.to(accumulation_dtype(matrix))) / self.scale
        self.dft_weight.copy_(torch.view_as_real(spectrum)[None])

    def start_from(self, conv: nn.Conv2d) -> None:
        """What is before the sigmoids is zero: until it is trained, the output, but for rounding, is that of `conv`."""
        self.transform(conv.weight)
        self.dft_weight.requires_grad_(conv.weight.requires_grad)
        for linear in self.gate_layers():
            for parameter in linear.parameters():
                parameter.zero_()
        nn.init.constant_(self.KSM_Global.bn.weight, 0.3)  # else the gates' first steps outpace the kernel's

    def formula(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if x.shape[0] == 0:  # which MKL's Fourier transform refuses
                return self.formula(F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)))[:0]
        kernels = self.factors_of(average(x))
        x = x if self.FBM is None else self.FBM(x)
        return self.finish(
            sample_conv2d(self.pad(x), kernels, self.stride, self.zero_padding, self.dilation, self.groups)
        )

    def factors(self, pooled: Tensor) -> Tensor:
        """The kernels, `[B, O, I, Kh, Kw]`."""
        (height, width), outputs, inputs = self.kernel_size, self.out_channels, self.in_channels
        if torch.jit.is_scripting():
            gates, local = self.KSM_Global(pooled), self.KSM_Local(pooled)
        else:
            gates, local = (in_dtype_of(pooled, part) for part in (self.KSM_Global, self.KSM_Local))
        spectrum = gates[-1][:, self.frequency_group.long(), None] * (self.scale * self.dft_weight.to(pooled.dtype))
        matrix = torch.fft.irfft2(torch.view_as_complex(with_real_edges(spectrum)), s=(self.rows, self.columns))
        kernels = matrix.view(-1, outputs, height, inputs, width).permute(0, 1, 3, 2, 4)
        local = local.unflatten(1, (outputs, height, width)).permute(0, 1, 4, 2, 3)
        kernels = kernels * local * gates[1][:, :, None, None, None] * gates[0][:, None, :, None, None]
        return kernels * gates[2].unflatten(1, (1, 1, height, width)) if len(gates) == 4 else kernels

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the gates of inputs, outputs, taps and groups, one after the other, `[B, n]`."""
        with no_autocast(x):
            return torch.cat(in_dtype_of(average(x), self.KSM_Global), 1)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *args) -> None:
        """The authors' have no `frequency_group`: then it stays as it is."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *args)
        if f"{prefix}frequency_group" in missing:
            missing.remove(f"{prefix}frequency_group")
            if self.frequency_group.is_meta:
                self.frequency_group = self.default_groups()
