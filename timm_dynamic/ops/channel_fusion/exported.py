"""A DCD convolution in ONNX graphs, in the shape that onnxruntime runs fast.

In evaluation both norms are affine maps of the latent channels q = Q x:

    P (BN2(Phi BN1(q)) + BN1(q)) = M q + m        M = P (s2 Phi + 1) s1,  m = P ((s2 Phi + 1) t1 + t2)

with the slopes s and offsets t of the norms: two products of maps for four, and no norm that the runtime cannot fold.
One matrix a sample for the whole layer, `scale * W + M Q`, was slower: 1.9 for 1.6 of the static network's time at
batch 1, 1.75 for 1.72 at 16 (dcd_mobilenetv2, onnxruntime 1.32, one thread of a CPU, November 2026).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(layer, x: Tensor) -> Tensor:
    """The layer's output, within its limits."""
    scale, matrix, bias = _factors(layer, x)
    z = F.conv2d(x, layer.q.weight, None, layer.stride)
    y = F.conv2d(x, layer.conv.weight, None, layer.stride, layer.zero_padding, layer.dilation, layer.groups)
    y = y * scale[:, :, None, None] + torch.bmm(matrix, z.flatten(2)).view(y.shape) + bias[:, :, None, None]
    return y if layer.limits is None else y.clamp(*layer.limits)


def _factors(layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale, `[B, O]`, M, `[B, O, L]`, and the bias, `[B, O]`, of every sample."""
    (squeeze, gate), p = layer.fc, layer.p.weight.flatten(1)
    (slope1, shift1), (slope2, shift2) = _affine(layer.bn1), _affine(layer.bn2)
    pooled = x.mean((2, 3)) if layer.pool_size == 1 else F.adaptive_avg_pool2d(x, layer.pool_size).flatten(1)
    z = squeeze(pooled)
    z = z * F.hardsigmoid(gate.fc[0](z)) * 2
    scale = F.hardsigmoid(layer.fc_scale(z)) * 2
    matrix = torch.matmul(p * slope2, layer.fc_phi(z).unflatten(1, (layer.latent_dim, -1))) + p
    bias = torch.matmul(matrix, shift1) + torch.mv(p, shift2)
    if layer.p.bias is not None:
        bias = bias + layer.p.bias
    if layer.conv.bias is not None:
        bias = bias + scale * layer.conv.bias
    return scale, matrix * slope1, bias


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Slope and offset of a batch norm in eval mode."""
    slope = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return slope, norm.bias - norm.running_mean * slope
