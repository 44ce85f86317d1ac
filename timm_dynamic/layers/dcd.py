"""Dynamic channel fusion by matrix decomposition, as a convolution and as a classifier.

Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021 (arXiv 2103.08756). A sample's weight
is a static one with its output channels rescaled, and a residual of rank L. Names are those of the authors' ResNets.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.absorbed_norms import fold, fold_products
from timm_dynamic.layers.base import DropInConv2d, DynamicLayer, check_positive, copy_weight
from timm_dynamic.layers.stand_in import stand_in_bias, stand_in_weight
from timm_dynamic.ops.channel_fusion.definition import hsig
from timm_dynamic.ops.channel_fusion.table import TABLE


class SqueezeGate(nn.Module):
    """`z * hsig(G z)`."""

    def __init__(self, features: int, **dd):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(features, features, bias=False, **dd))

    def forward(self, z: Tensor) -> Tensor:
        return z * hsig(self.fc(z))


class _ChannelFusion(DynamicLayer):
    """What both layers have: the network from pooled features to Phi and scale, and the latent channels."""

    family = "dcd"
    routing_limit = 2.0
    static = "conv"
    __jit_unused_properties__ = ["weight", "bias"]

    def _make_heads(self, features: int, outputs: int, latent_dim: int, hidden_dim: int, **dd) -> None:
        self.latent_dim = latent_dim
        squeeze = nn.Linear(features, hidden_dim, bias=False, **dd)
        self.fc = nn.Sequential(squeeze, SqueezeGate(hidden_dim, **dd))
        self.fc_phi = nn.Linear(hidden_dim, latent_dim**2, bias=False, **dd)
        self.fc_scale = nn.Linear(hidden_dim, outputs, bias=False, **dd)

    def fuse(self, pooled: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """scale(x), `[B, O]`, and `BN2(Phi(x) BN1(Q x)) + BN1(Q x)`, in the shape of q, `[B, L, ...]`."""
        z = self.fc(pooled)
        phi, scale = self.fc_phi(z).unflatten(1, (self.latent_dim, -1)), hsig(self.fc_scale(z))
        u = self.bn1(q).flatten(2)
        return scale, (self.bn2(torch.bmm(phi, u)) + u).view(q.shape)

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: the scale of the outputs, `[B, O]`."""
        return self.factors_of(x)[0]

    @stand_in_bias
    def bias(self) -> Tensor | None:
        """At a scale of 1."""
        bias, shift = getattr(self, self.static).bias, self.p.bias
        return bias if shift is None else shift if bias is None else bias + shift


@register_notrace_module
class DCDConv2d(_ChannelFusion, DropInConv2d):
    """Convolution with dynamic channel fusion; takes the place of an `nn.Conv2d`.

        y = scale(x) * conv(x) + P (BN2(Phi(x) BN1(Q x)) + BN1(Q x))

    Q and P are 1x1 convolutions to and from L channels, Q with the stride of `conv`. With z the average-pooled input
    after a linear layer and the gate `z * hsig(G z)`: Phi, `[B, L, L]`, is linear in z, and scale, `[B, out_channels]`,
    is hsig of a linear layer of z; `hsig(t) = relu6(t + 3) / 3`. BN2 normalises over `[B, L, Ho*Wo]`.

    Args:
        in_channels, out_channels, stride, dilation, groups, padding_mode: As for `nn.Conv2d`. Q and P are not grouped.
        kernel_size: Odd.
        padding: `dilation * (kernel_size // 2)`, or `"same"` with stride 1: Q reads what the central tap reads.
        bias: Add one to `conv`; it is scaled too.
        latent_dim: L; by default the root of the number of pooled features, `in_channels * pool_size**2`.
        hidden_dim: Length of z; by default a sixteenth of L**2 or of the number of pooled features, and at least 4.
        pool_size: The input is average-pooled to `[B, in_channels, pool_size, pool_size]`.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If the arguments describe a convolution that it cannot replace; in the forward pass, if the input is
            not `[B, in_channels, H, W]`, or leaves a single number to normalise in training (one sample, 1x1 output).
    """

    implementations = TABLE
    parts = (
        *((nn.Conv2d, name) for name in ("conv", "q", "p")),
        *((nn.Linear, name) for name in ("fc.0", "fc.1.fc.0", "fc_phi", "fc_scale")),
        *((nn.Sequential, "fc"), (SqueezeGate, "fc.1"), (nn.Sequential, "fc.1.fc")),
        *((nn.BatchNorm2d, "bn1"), (nn.BatchNorm1d, "bn2")),
    )
    reference_names = {"conv_q": "q", "conv_p": "p"}  # the authors' names in MobileNetV2

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
        latent_dim: int | None = None,
        hidden_dim: int | None = None,
        pool_size: int = 1,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"DCD needs a central tap: kernel_size must be odd, got {kernel_size}")
        same = tuple(d * (k // 2) for k, d in zip(self.kernel_size, self.dilation, strict=True))
        if self.padding not in ("same", same) and (self.padding, same) != ("valid", (0, 0)):
            raise ValueError(f"DCD needs padding dilation * (kernel_size // 2) = {same}, got {padding!r}")
        check_positive(latent_dim=latent_dim, hidden_dim=hidden_dim, pool_size=pool_size)
        pooled = in_channels * pool_size**2
        latent_dim = latent_dim or int(pooled**0.5)
        hidden_dim = hidden_dim or max(max(pooled, latent_dim**2) // 16, 4)
        self.pool_size = pool_size
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **dd
        )
        self.q = nn.Conv2d(in_channels, latent_dim, 1, stride, bias=False, **dd)
        self.p = nn.Conv2d(latent_dim, out_channels, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(latent_dim, **dd)
        self.bn2 = nn.BatchNorm1d(latent_dim, **dd)
        self._make_heads(pooled, out_channels, latent_dim, hidden_dim, **dd)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """P and the scale's linear layer are zero: until they are trained, the output is that of `conv`."""
        copy_weight(conv, self.conv.weight)
        for part, value in ((self.p, 0), (self.fc_scale, 0), (self.bn1, 0.25), (self.bn2, 0.25)):
            part.weight.fill_(value)  # of norms: so that P's first steps do not outpace those of the convolution

    def formula(self, x: Tensor) -> Tensor:
        scale, v = self.factors_of(x)
        y = self.conv(x)
        return scale.to(y.dtype)[:, :, None, None] * y + self.p(v)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale(x), and what P reads."""
        q = self.q(x)
        if self.bn1.training and q[:, 0].numel() == 1:
            raise ValueError("DCD normalises over batch and positions: training needs more than one sample of 1x1 maps")
        return self.fuse(F.adaptive_avg_pool2d(x, self.pool_size).flatten(1), q)

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.conv.weight.mul_(scale[:, None, None, None]), self.p.weight.mul_(scale[:, None, None, None])
        if self.conv.bias is not None:
            self.conv.bias.mul_(scale)
        self.p.bias = nn.Parameter(shift if self.p.bias is None else self.p.bias * scale + shift)
        fold(self, "q", "bn1"), fold_products(self, "fc_phi", "bn2", "p")


@register_notrace_module
class DCDLinear(_ChannelFusion):
    """Classifier with dynamic channel fusion; takes the place of an `nn.Linear`.

        y = scale(x) * linear(x) + P (BN2(Phi(x) BN1(Q x)) + BN1(Q x))

    with x itself as the pooled features (see `DCDConv2d`). The bias is scaled too.

    Args:
        in_features, out_features, bias: As for `nn.Linear`.
        latent_dim: L, the number of latent features.
        hidden_dim: Length of the vector before Phi and scale.

    Shape:
        `[B, in_features]` to `[B, out_features]`.

    Raises:
        ValueError: If an argument has an unusable value, the input another shape, or the batch is 1 in training: the
            norms work over the batch.
    """

    static = "linear"
    weight = stand_in_weight(lambda layer: (layer.out_features, layer.in_features))
    extra_repr = nn.Linear.extra_repr
    reference_names = {"cls": "linear", "cls_q": "q", "cls_p": "p"}  # the authors' names

    def __init__(
        self, in_features: int, out_features: int, bias=True, device=None, dtype=None, *, latent_dim=32, hidden_dim=32
    ):
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        check_positive(latent_dim=latent_dim, hidden_dim=hidden_dim)
        self.in_features, self.out_features = in_features, out_features
        dd = {"device": device, "dtype": dtype}
        self.linear = nn.Linear(in_features, out_features, bias, **dd)
        self.q = nn.Linear(in_features, latent_dim, bias=False, **dd)
        self.p = nn.Linear(latent_dim, out_features, bias=False, **dd)
        self.bn1 = nn.BatchNorm1d(latent_dim, **dd)
        self.bn2 = nn.BatchNorm1d(latent_dim, **dd)
        self._make_heads(in_features, out_features, latent_dim, hidden_dim, **dd)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be [B, {self.in_features}], got shape {list(x.shape)}")
        if self.bn1.training and x.shape[0] == 1:
            raise ValueError("DCD's classifier normalises over the batch: training needs more than one sample")

    def formula(self, x: Tensor) -> Tensor:
        scale, y, v = self.factors_of(x)
        return scale * y + v

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """scale(x), and both terms, in the parameters' precision: the layer is small."""
        scale, v = self.fuse(x, self.q(x)[:, :, None])
        return scale, self.linear(x), self.p(v.flatten(1))
