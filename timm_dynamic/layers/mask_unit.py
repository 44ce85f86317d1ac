"""Learned masks: where a residual branch is worth computing.

Verelst and Tuytelaars, "Dynamic Convolutions: Exploiting Spatial Sparsity for Faster Inference", CVPR 2020 (arXiv
1912.03203). Parameters are named as in the authors' networks.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.base import DynamicLayer, check_positive
from timm_dynamic.layers.progress import Progress
from timm_dynamic.ops.sparse.table import MASK

_EPS = 1e-8
_MILESTONES = (0.3, 0.6)  # of the training: where the second and the third temperature begin


class _Squeeze(nn.Module):
    """A 3x3 convolution to one channel plus a linear layer of the mean over positions (section 3.1)."""

    def __init__(self, channels: int, stride: int, **dd):
        super().__init__()
        self.fc = nn.Linear(channels, 1, **dd)
        self.conv = nn.Conv2d(channels, 1, 3, stride, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.fc(x.mean((2, 3)))[:, :, None, None]


@register_notrace_module
class MaskUnit(DynamicLayer):
    """A mask of the positions that a residual branch computes: 1 where it does, else 0.

    The logits are `conv3x3(x; C -> 1) + linear(mean(x); C -> 1)`, or a 1x1 convolution. In eval mode the mask is
    `logits >= 0`. In training it is `sigmoid((logits + g1 - g2) / temperature) >= 1/2` with Gumbel noise g1 and g2, and
    its gradient that of the sigmoid (straight-through). The noise ends when 80 % of the training are done (see
    `timm_dynamic.set_progress`).

    Args:
        in_channels: C.
        stride: Of the mask: that of the branch.
        kernel_size: 3, or 1 for the variant without the mean.
        temperature: One for the whole training, or three: before 30 %, before 60 % of the training, and after.
        gumbel_noise: Whether there is noise in training, from PyTorch's default generator.

    Shape:
        `[B, C, H, W]` to `[B, 1, ceil(H/stride), ceil(W/stride)]`, in the input's dtype.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.

    Attributes:
        noisy_until: The share of the training up to which there is noise.
    """

    family = "dynconv"
    implementations = MASK
    parts = ((_Squeeze, "maskconv"), (nn.Conv2d, "maskconv.conv"), (nn.Linear, "maskconv.fc"))
    absorb = None
    noisy_until = 0.8

    def __init__(
        self,
        in_channels: int,
        stride: int = 1,
        kernel_size: int = 3,
        device=None,
        dtype=None,
        *,
        temperature: float | tuple[float, float, float] = 1.0,
        gumbel_noise: bool = True,
    ):
        super().__init__()
        check_positive(in_channels=in_channels, stride=stride)
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size must be 3 (with the mean over positions) or 1, got {kernel_size}")
        temperatures = (temperature,) if isinstance(temperature, (int, float)) else tuple(temperature)
        if len(temperatures) not in (1, 3) or not min(temperatures) > 0:
            raise ValueError(f"temperature must be positive, one number or three, got {temperature}")
        self.in_channels, self.stride, self.kernel_size = in_channels, stride, kernel_size
        self.temperatures, self.gumbel_noise = temperatures, gumbel_noise
        dd = {"device": device, "dtype": dtype}
        if kernel_size == 3:
            self.maskconv = _Squeeze(in_channels, stride, **dd)
        else:
            self.maskconv = nn.Conv2d(in_channels, 1, 1, stride, **dd)
            self.parts = ((nn.Conv2d, "maskconv"),)
        self.progress, self.number = Progress(False, device=device), 1

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of convolutions and linear layers."""
        for layer in self.maskconv.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, stride={self.stride}, kernel_size={self.kernel_size}"

    def formula(self, x: Tensor) -> Tensor:
        logits = self.maskconv(x)
        if self.training and not torch.jit.is_scripting():
            self.progress.count(self.number)
            return self._sample(logits).to(x.dtype)
        return (logits >= 0).to(x.dtype)

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the mask of eval mode."""
        return (self.maskconv(x) >= 0).to(x.dtype)

    @torch.jit.unused
    def optimized(self) -> "MaskUnit":
        """For `timm_dynamic.optimize`: nothing in it is to be changed."""
        return self

    @torch.jit.unused
    def _sample(self, logits: Tensor) -> Tensor:
        done = self.progress(self.training)
        # In float32 or wider: a half-precision uniform number is 0 or 1 too often.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.gumbel_noise:
            uniform = torch.rand(2, *logits.shape, dtype=logits.dtype, device=logits.device)
            first, second = -torch.log(-torch.log(uniform + _EPS) + _EPS)
            logits = logits + (first - second) * (done <= self.noisy_until + 1e-9)
        temperature = torch.full_like(done, self.temperatures[0])
        for milestone, later in zip(_MILESTONES, self.temperatures[1:], strict=False):
            temperature = torch.where(done < milestone - 1e-9, temperature, later)
        soft = torch.sigmoid(logits / temperature.to(logits.dtype))
        return (soft >= 0.5).to(logits.dtype) + (soft - soft.detach())
