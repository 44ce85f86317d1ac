"""The static parts of LSNet: depthwise convolution with branches, attention, feed-forward and the classifier."""

import copy

import torch
from timm.layers import DropPath, SEModule, register_notrace_module, trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_dynamic.layers import LSConv
from timm_dynamic.layers.lsnet import ConvNorm
from timm_dynamic.layers.pooled_norm import normalize_pooled
from timm_dynamic.ops.norms import affine


class RepVGGDW(nn.Module):
    """Depthwise convolutions beside each other and beside the identity: `BN(dw3x3(x)) + BN(dw1x1(x)) + x`.

    Args:
        dim: Number of channels.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = ConvNorm(dim, dim, 3, groups=dim, **dd)
        self.conv1 = ConvNorm(dim, dim, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv1(x) + x

    @torch.no_grad()
    def optimized(self) -> nn.Conv2d | None:
        """For `timm_dynamic.optimize`: the one convolution that gives the same in eval mode."""
        kinds = [type(one) for part in (self.conv, self.conv1) for one in part]
        if kinds != [nn.Conv2d, nn.BatchNorm2d] * 2:
            return None  # replaced or parametrized parts
        dtype = self.conv.c.weight.dtype
        conv, conv1 = (fuse_conv_bn_eval(*copy.deepcopy(part).double()) for part in (self.conv, self.conv1))
        conv.weight[:, :, 1, 1] += conv1.weight[:, :, 0, 0] + 1
        conv.bias += conv1.bias
        return conv.to(dtype)


@register_notrace_module
class Attention(nn.Module):
    """Attention between all positions, with a bias for each distance: LeViT's, with a depthwise convolution of q.

    Args:
        dim: Number of channels.
        key_dim: Of q and k, for each head.
        num_heads: Number of heads; divides `dim`.
        resolution: Rows and columns of the largest map.

    Raises:
        ValueError: If `num_heads` does not divide `dim`; from the forward pass, if the map is larger.
    """

    def __init__(self, dim: int, key_dim: int, num_heads: int, resolution: tuple[int, int], device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels, {dim}, got {num_heads}")
        dd = {"device": device, "dtype": dtype}
        inner = key_dim * num_heads
        self.num_heads, self.scale, self.resolution = num_heads, key_dim**-0.5, resolution
        self.sizes = [inner, inner, dim]
        self.qkv = ConvNorm(dim, 2 * inner + dim, **dd)
        self.dw = ConvNorm(inner, inner, 3, groups=inner, **dd)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, *resolution, **dd))  # by the distance in y and x
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, gain=0.0, **dd))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes, 1)
        q, k, v = [t.flatten(2).unflatten(1, (self.num_heads, -1)) for t in [self.dw(q), k, v]]
        scores = q.transpose(2, 3) @ k * self.scale + self.bias(x.shape[2], x.shape[3])
        y = v @ scores.softmax(-1).transpose(2, 3)
        return self.proj(y.flatten(1, 2).unflatten(2, x.shape[2:]))

    def bias(self, height: int, width: int) -> Tensor:
        """`[num_heads, height * width, height * width]`: of every pair of positions, by their distance."""
        rows, columns = self.resolution
        if height > rows or width > columns:
            raise ValueError(
                f"a map of {height} x {width} positions is larger than that of the attention biases, {rows} x "
                f"{columns}: create the model with img_size=(height, width) of the largest images (commands: "
                "--img-size 288)"
            )
        y = torch.arange(height, device=self.attention_biases.device)
        x = torch.arange(width, device=self.attention_biases.device)
        dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
        return self.attention_biases[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3).flatten(1, 2)


class Residual(nn.Module):
    """`x + m(x)`, in training with stochastic depth.

    Args:
        m: Any module that keeps the shape.
        drop_path: Probability of leaving m out.
    """

    def __init__(self, m: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.m(x))


class FFN(nn.Module):
    """Two 1x1 convolutions with norms, twice as wide between them, and a ReLU.

    Args:
        dim: Number of channels.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pw1 = ConvNorm(dim, 2 * dim, **dd)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * dim, dim, gain=0.0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class Block(nn.Module):
    """`ffn(se(mixer(x)))`. The mixer is depthwise in blocks of even number; in others `LSConv`, or attention.

    Args:
        dim: Number of channels.
        number: Of the block in its stage.
        attention: None, or arguments of `Attention` after the first.
        drop_path: Probability of leaving a residual branch out.
    """

    def __init__(self, dim: int, number: int, attention: tuple | None, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if number % 2 == 0:
            self.mixer = RepVGGDW(dim, **dd)
        elif attention is None:
            self.mixer = LSConv(dim, **dd)
        else:
            self.mixer = Residual(Attention(dim, *attention, **dd), drop_path)
        self.se = nn.Identity() if number % 2 else SEModule(dim, rd_ratio=0.25, **dd)
        self.ffn = Residual(FFN(dim, **dd), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.se(self.mixer(x)))


@register_notrace_module
class NormLinear(nn.Module):
    """Batch norm of pooled features and a linear layer. A batch of one takes running statistics, in training, too.

    Args:
        in_features, out_features: As for `nn.Linear`.
        drop: Probability of dropout between the two.
    """

    def __init__(self, in_features: int, out_features: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm1d(in_features, **dd)
        self.drop = nn.Dropout(drop)
        self.l = nn.Linear(in_features, out_features, **dd)
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.bn(x)
        else:
            x = normalize_pooled(self.bn, x)
        return self.l(self.drop(x))

    @torch.no_grad()
    def optimized(self) -> nn.Linear | None:
        """For `timm_dynamic.optimize`: the linear layer that gives the same in eval mode."""
        if (type(self.bn), type(self.l)) != (nn.BatchNorm1d, nn.Linear):
            return None
        dtype, (bn, linear) = self.l.weight.dtype, copy.deepcopy(nn.ModuleList([self.bn, self.l])).double()
        scale, offset = affine(bn)
        linear.bias += linear.weight @ offset
        linear.weight *= scale
        return linear.to(dtype)
