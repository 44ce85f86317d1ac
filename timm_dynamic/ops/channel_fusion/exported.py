"""A DCD convolution in ONNX graphs, in the shape that onnxruntime runs fast.

In evaluation both norms are affine maps of the latent channels u = Q x:

    P (BN2(Phi BN1(u)) + BN1(u)) = P (A u + a)        A = (s2 Phi + 1) s1,  a = (s2 Phi + 1) t1 + t2

with the slopes s and offsets t of the norms. A, a and the scale before hsig are affine maps of the gated features z:
one product gives all three (dcd_mobilenetv2 at batch 1, two threads: 0.95 of the time of a product for each and the
norms' arithmetic). Where positions are many for a latent channel, a 1x1 convolution has one matrix a sample,
`scale * W + P A Q`, in a Scan with its bias and activation: no map is written twice. Elsewhere that matrix costs as
much as the convolution; there P is a static convolution of A u + a.

Bottlenecks of dcd_resnet50 from 56x56 to 7x7, in units of the static one: 1.19, 1.17, 1.22 and 1.17. With P A as a
product for each sample, 1.45, 1.30, 1.26 and 1.32; with one matrix everywhere 1.25, 1.44, 1.90 and 4.1 (onnxruntime
1.32, one thread of a CPU, batch 1, November 2026).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.ops.norms import affine
from timm_dynamic.ops.scan import scan

# A convolution of ONNX runs in the runtime's own layout if its input channels fill blocks of 16, on some CPUs of 8.
_BLOCK = 16
# Positions for a latent channel from which one matrix a sample is faster: 196 for 8 are enough, for 16 they are not.
_MANY = 24


def convolve(layer, x: Tensor) -> Tensor:
    """The layer's output, within its limits."""
    return (_multiply if _is_large_product(layer, x) else _add)(layer, x)


def _is_large_product(layer, x: Tensor) -> bool:
    plain = (layer.kernel_size, layer.stride, layer.zero_padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return plain and all(isinstance(n, int) for n in x.shape[2:]) and x.shape[2:].numel() >= _MANY * layer.latent_dim


def _multiply(layer, x: Tensor) -> Tensor:
    """A product with one matrix a sample."""
    p = layer.p.weight.flatten(1)
    mixing, offset = _maps(layer)
    bias = torch.matmul(p, offset)
    if layer.p.bias is not None:
        bias = bias + _constant(layer.p.bias, bias)
    scale, bias, matrix = _factors(layer, x, bias, mixing)
    if layer.conv.bias is not None:
        bias = bias + scale * (2 * layer.conv.bias)

    def convolve_sample(x: Tensor, scale: Tensor, mixed: Tensor, bias: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        weight = weight * scale.mT + torch.matmul(mixed, q).squeeze(0)
        return _limit(layer, F.conv2d(x, weight[:, :, None, None], bias.flatten()))

    samples = {"x": x, "scale": scale, "mixed": torch.matmul(p, matrix), "bias": bias}
    return scan(convolve_sample, samples, {"weight": 2 * layer.conv.weight.flatten(1), "q": layer.q.weight.flatten(1)})


def _add(layer, x: Tensor) -> Tensor:
    """The two terms."""
    L, conv = layer.latent_dim, layer.conv
    more = 0 if L <= _BLOCK // 2 else -L % _BLOCK  # rows of zeros
    mixing, offset, p = *_maps(layer), layer.p.weight
    if more:
        mixing, offset = (torch.cat([maps, maps.new_zeros(more, *maps.shape[1:])]) for maps in (mixing, offset))
        p = torch.cat([p, p.new_zeros(len(p), more, 1, 1)], 1)
    scale, offset, matrix = _factors(layer, x, offset, mixing)
    u = F.conv2d(x, layer.q.weight, None, layer.stride)
    v = (torch.bmm(matrix, u.flatten(2)) + offset[:, :, None]).unflatten(2, u.shape[2:])
    weight, bias = 2 * conv.weight, None if conv.bias is None else 2 * conv.bias
    y = F.conv2d(x, weight, bias, layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    return _limit(layer, y * scale[:, :, None, None] + F.conv2d(v, p, layer.p.bias))


def _limit(layer, y: Tensor) -> Tensor:
    return y if layer.limits is None else y.clamp(*layer.limits)


def _maps(layer) -> tuple[Tensor, Tensor]:
    """A and a as affine maps of z, `[L, L, s + 1]` and `[L, s + 1]`: their values at 0 stand behind the slopes."""
    (slope1, shift1), (slope2, shift2) = (_affine(norm, layer) for norm in (layer.bn1, layer.bn2))
    if layer.q.bias is not None:
        shift1 = shift1 + slope1 * layer.q.bias
    phi = layer.fc_phi.weight.unflatten(0, (layer.latent_dim, -1))
    one = torch.eye(layer.latent_dim, dtype=phi.dtype, device=phi.device)
    mixing = torch.cat([slope2[:, None, None] * phi, one[:, :, None]], 2)
    offset = (mixing * shift1[:, None]).sum(1)
    return mixing * slope1[:, None], offset + _constant(shift2, offset)


def _constant(values: Tensor, maps: Tensor) -> Tensor:
    """`values`, `[n]`, as maps of z, `[n, s + 1]`."""
    return torch.cat([values.new_zeros(len(values), maps.shape[1] - 1), values[:, None]], 1)


def _factors(layer, x: Tensor, offset: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half of scale, `[B, O]`, and the two maps of z, `[B, n]` and `[B, rows, L]`, of every sample: one product."""
    squeeze, gate = layer.fc
    pooled = x.mean((2, 3)) if layer.pool_size == 1 else F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1)
    z = squeeze(pooled)
    z = z * F.hardsigmoid(gate.fc[0](z))  # half of it
    scale = layer.fc_scale.weight
    maps = torch.cat([torch.cat([scale, scale.new_zeros(len(scale), 1)], 1), offset, matrix.flatten(0, 1)])
    slopes = 2 * maps[:, :-1]
    scale, offset, matrix = F.linear(z, slopes, maps[:, -1]).split([len(scale), len(offset), matrix[..., 0].numel()], 1)
    return F.hardsigmoid(scale), offset, matrix.unflatten(1, (-1, layer.latent_dim))


def _affine(norm: nn.Module, layer) -> tuple[Tensor, Tensor]:
    one, L = layer.q.weight.new_ones(()), layer.latent_dim
    return (one.expand(L), 0 * one.expand(L)) if isinstance(norm, nn.Identity) else affine(norm)
