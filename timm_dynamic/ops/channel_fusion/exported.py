"""A DCD convolution in ONNX graphs, in the shape that onnxruntime runs fast.

In evaluation both norms are affine maps of the latent channels q = Q x:

    P (BN2(Phi BN1(q)) + BN1(q)) = M q + m        M = P (s2 Phi + 1) s1,  m = P ((s2 Phi + 1) t1 + t2)

with the slopes s and offsets t of the norms. So a sample of a 1x1 convolution has one matrix, `scale * W + M Q`, and
one bias: there are no maps to rescale and to add, and none to bring from one layout of the runtime into another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.ops.scan import scan


def convolve(layer, x: Tensor) -> Tensor:
    """The layer's output, within its limits."""
    options, limits = (layer.stride, layer.zero_padding, layer.dilation, layer.groups), layer.limits
    one_matrix = layer.kernel_size == (1, 1) and layer.groups == 1 and _pays(layer, x)

    def sample(x: Tensor, scale: Tensor, matrix: Tensor, bias: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        weight, matrix, bias = weight * scale[0, :, None, None, None], matrix[0], bias[0]
        if one_matrix:
            y = F.conv2d(x, weight + torch.mm(matrix, q)[:, :, None, None], bias, *options)
        else:
            z = F.conv2d(x, q[:, :, None, None], None, layer.stride)
            y = F.conv2d(x, weight, bias, *options) + F.conv2d(z, matrix[:, :, None, None])
        return y if limits is None else y.clamp(*limits)

    scale, matrix, bias = _factors(layer, x)
    others = {"weight": layer.conv.weight, "q": layer.q.weight.flatten(1)}
    return scan(sample, {"x": x, "scale": scale, "matrix": matrix, "bias": bias}, others)


def _pays(layer, x: Tensor) -> bool:
    """Whether making the matrix is less work than products with Q and M, as far as the size is known."""
    H, W = x.shape[2:]
    return not (isinstance(H, int) and isinstance(W, int)) or H * W > 4 * layer.latent_dim * max(layer.stride) ** 2


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
