"""A DCD convolution in ONNX graphs, in the shape that onnxruntime runs fast.

In evaluation both norms are affine maps of the latent channels z = Q x:

    P (BN2(Phi BN1(z)) + BN1(z)) = P (A z + a)        A = (s2 Phi + 1) s1,  a = (s2 Phi + 1) t1 + t2

with the slopes s and offsets t of the norms. Where positions are many for a latent channel, a 1x1 convolution has one
matrix a sample, `scale * W + P A Q`, in a Scan with its bias and activation: no map is written twice. Elsewhere that
matrix costs as much as the convolution; there P is a static convolution of A z + a.

Bottlenecks of dcd_resnet50 from 56x56 to 7x7, in units of the static one: 1.19, 1.17, 1.22 and 1.17. With P A as a
product for each sample, 1.45, 1.30, 1.26 and 1.32; with one matrix everywhere 1.25, 1.44, 1.90 and 4.1 (onnxruntime
1.32, one thread of a CPU, batch 1, November 2026).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    scale, matrix, offset = _factors(layer, x, layer.latent_dim)
    p = layer.p.weight.flatten(1)
    bias = torch.matmul(offset, p.mT)
    if layer.p.bias is not None:
        bias = bias + layer.p.bias
    if layer.conv.bias is not None:
        bias = bias + scale * layer.conv.bias

    def convolve_sample(x: Tensor, scale: Tensor, mixed: Tensor, bias: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        weight = weight * scale.mT + torch.matmul(mixed, q).squeeze(0)
        return _limit(layer, F.conv2d(x, weight[:, :, None, None], bias.flatten()))

    samples = {"x": x, "scale": scale, "mixed": torch.matmul(p, matrix), "bias": bias}
    return scan(convolve_sample, samples, {"weight": layer.conv.weight.flatten(1), "q": layer.q.weight.flatten(1)})


def _add(layer, x: Tensor) -> Tensor:
    """The two terms."""
    L, conv = layer.latent_dim, layer.conv
    rows = L if L <= _BLOCK // 2 else L + -L % _BLOCK
    scale, matrix, offset = _factors(layer, x, rows)
    z = F.conv2d(x, layer.q.weight, None, layer.stride)
    v = (torch.bmm(matrix, z.flatten(2)) + offset[:, :, None]).unflatten(2, z.shape[2:])
    p = torch.matmul(layer.p.weight.flatten(1), _identity(rows, L, x).mT)[:, :, None, None]
    y = F.conv2d(x, conv.weight, conv.bias, layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    return _limit(layer, y * scale[:, :, None, None] + F.conv2d(v, p, layer.p.bias))


def _limit(layer, y: Tensor) -> Tensor:
    return y if layer.limits is None else y.clamp(*layer.limits)


def _factors(layer, x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale, `[B, O]`, A, `[B, rows, L]`, and a, `[B, rows]`, of every sample; from row L on they are zero."""
    squeeze, gate = layer.fc
    (slope1, shift1), (slope2, shift2) = _affine(layer.bn1), _affine(layer.bn2)
    pooled = x.mean((2, 3)) if layer.pool_size == 1 else F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1)
    z = squeeze(pooled)
    z = z * F.hardsigmoid(gate.fc[0](z)) * 2
    scale = F.hardsigmoid(layer.fc_scale(z)) * 2
    one = _identity(rows, layer.latent_dim, x)
    matrix = torch.matmul(one * slope2, layer.fc_phi(z).unflatten(1, (layer.latent_dim, -1))) + one
    return scale, matrix * slope1, torch.matmul(matrix, shift1) + torch.mv(one, shift2)


def _identity(rows: int, columns: int, x: Tensor) -> Tensor:
    return torch.eye(rows, columns, dtype=x.dtype, device=x.device)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Slope and offset of a batch norm in eval mode."""
    slope = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return slope, norm.bias - norm.running_mean * slope
