"""What `gpu_roof.py` times: every operator of the package at the shapes of networks, and what it must do at least.

A case knows the bytes that must move (each input read once, each output written once) and the operations of its matrix
products. Both are counts, whatever the code does.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers import DCDConv2d
from timm_dynamic.ops import ddf, factored_conv2d, mixed_conv2d, per_sample_conv2d, sparse
from timm_dynamic.ops.learned_mask import pack_mask_weights

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# The first seven are those of the authors' timing tool.
DDF_SHAPES = [(32, 256, n, n) for n in (224, 112, 56, 28, 14, 7)] + [(2, 256, 200, 300), (128, 64, 56, 56)]
# Of ResNet-50's stages: batch, side, channels outside and inside a block. Half of the positions are active.
SPARSE_SHAPES = [(128, 56, 256, 64), (128, 28, 512, 128), (128, 14, 1024, 256), (128, 7, 2048, 512)]
BATCHES = (64, 128)
# Of ResNet-18 and ResNet-50: channels in and out, kernel size, side.
THREE_BY_THREE = [(64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7)]
POINTWISE = [(256, 64, 1, 56), (64, 256, 1, 56), (1024, 256, 1, 14), (256, 1024, 1, 14)]
KERNELS = 4  # of a mixture


class Case(NamedTuple):
    """One thing to time.

    Attributes:
        operator: Group that it belongs to.
        what: The operator, or what it is compared with.
        shape: In words.
        dtype, layout: Of the maps.
        call: What is timed.
        bytes: That must move at least.
        flops: Of the matrix products, if it has any.
        in_graph: Whether the call can be part of a CUDA graph: it does not wait for the GPU.
    """

    operator: str
    what: str
    shape: str
    dtype: torch.dtype
    layout: str
    call: Callable[[], object]
    bytes: int
    flops: int = 0
    in_graph: bool = True


def floor_ms(case: Case, copy_gb_per_s: float, tflop_per_s: float) -> float:
    """The least time that a GPU with this bandwidth and matrix rate needs."""
    return max(case.bytes / copy_gb_per_s / 1e6, case.flops / tflop_per_s / 1e9)


def ddf_cases(device: torch.device) -> Iterator[Case]:
    for shape in DDF_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                yield from _ddf(shape, dtype, layout, device)


def _ddf(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Iterator[Case]:
    B, C, H, W = shape
    x = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=LAYOUTS[layout])
    channel = torch.randn(B, C, 3, 3, dtype=dtype, device=device)
    spatial = torch.randn(B, 9, H, W, dtype=dtype, device=device)
    weight = torch.randn(C, 1, 3, 3, dtype=dtype, device=device).contiguous(memory_format=LAYOUTS[layout])
    maps, filters = 2 * x.nbytes, channel.nbytes + spatial.nbytes

    def gradients(*needs: bool) -> Callable[[], object]:  # x stands for the gradient too: same size
        return lambda: torch.ops.timm_dynamic.ddf_backward(x, x, channel, spatial, 3, 1, 1, "mul", list(needs))

    calls = {
        "forward": (lambda: ddf(x, channel, spatial), maps + filters),
        "grad of features": (gradients(True, False, False), maps + filters),
        "grads of filters": (gradients(False, True, True), maps + 2 * filters),
        "copy": (lambda: x.clone(), maps),
        "depthwise, torch": (lambda: F.conv2d(x, weight, None, 1, 1, 1, C), maps + weight.nbytes),
    }
    if device.type == "cuda":
        options = ([1, 1], [1, 1], [1, 1], C, True, False, False)  # padding, stride, dilation, groups, benchmark
        cudnn = torch.ops.aten.cudnn_convolution
        calls["depthwise, cuDNN"] = (lambda: cudnn(x, weight, *options), maps + weight.nbytes)
    for what, (call, moved) in calls.items():
        yield Case("ddf", what, str(list(shape)), dtype, layout, call, moved)


def sparse_cases(device: torch.device) -> Iterator[Case]:
    for shape in SPARSE_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield from _sparse(shape, dtype, device)


def _sparse(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    B, n, outside, inside = shape
    P = B * n * n
    limits = (0.0, math.inf)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    mask = (torch.rand(B, 1, n, n, device=device) < 0.5).to(dtype)
    window = ((n, n), (3, 3), (1, 1), (1, 1), (1, 1))  # input size, kernel size, stride, dilation, padding
    positions = mask.flatten().nonzero()[:, 0].int()
    table = sparse.window_table(positions, (n, n), *window)
    M = len(positions)
    wide, narrow, rows = randn(P, outside), randn(P, inside), randn(M, outside)
    single = positions[:, None].contiguous()
    taps, bias = randn(9, inside), randn(inside)
    matrix = sparse.pack_matrix(randn(9 * inside, inside))
    x = randn(B, outside, n, n).contiguous(memory_format=torch.channels_last)
    unit = pack_mask_weights(randn(1, outside, 3, 3), randn(1), randn(1, outside), randn(1))
    row, learned_mask = wide[0].nbytes, torch.ops.timm_dynamic.learned_mask

    depthwise = narrow.nbytes + table.nbytes + taps.nbytes + bias.nbytes + M * narrow[0].nbytes
    product = narrow.nbytes + table.nbytes + matrix.nbytes + bias.nbytes + M * narrow[0].nbytes
    needed = len(sparse.neighbour_table(mask, *window)[1])
    made = [
        ("gather_rows", lambda: sparse.gather_rows(wide, single, *limits), 2 * M * row + single.nbytes, 0),
        (
            "gather_rows, 9 taps",
            lambda: sparse.gather_rows(narrow, table, *limits),
            narrow.nbytes + table.nbytes + table.numel() * narrow[0].nbytes,
            0,
        ),
        ("scatter_rows_", lambda: sparse.scatter_rows_(wide, positions, rows, *limits), 3 * M * row + 4 * M, 0),
        ("gather_depthwise", lambda: sparse.gather_depthwise(narrow, table, taps, bias, *limits), depthwise, 0),
        (
            "gather_conv",
            lambda: sparse.gather_conv(narrow, table, matrix, bias, *limits),
            product,
            2 * M * 9 * inside * inside,
        ),
        (
            "window_table",
            lambda: sparse.window_table(positions, (n, n), *window),
            positions.nbytes + table.nbytes,
            0,
        ),
        (
            "learned_mask",
            lambda: learned_mask(x, unit, 1),
            x.nbytes + unit.nbytes + mask.nbytes,
            0,
        ),
        (
            "fixed_neighbour_table",
            lambda: sparse.fixed_neighbour_table(mask, *window, (M, needed)),
            mask.nbytes + positions.nbytes + 4 * needed + table.nbytes,
            0,
        ),
        (
            "neighbour_table",
            lambda: sparse.neighbour_table(mask, *window),
            mask.nbytes + positions.nbytes + 4 * needed + table.nbytes,
            0,
        ),
    ]
    for what, call, moved, flops in made:
        words = f"[{B}, {outside}/{inside}, {n}, {n}], {M} active"
        in_graph = what != "neighbour_table"
        yield Case("sparse", what, words, dtype, "rows", torch.no_grad()(call), moved, flops, in_graph)


class _Maps(NamedTuple):
    """What the convolutions below have in common."""

    x: Tensor
    grad: Tensor
    words: str
    bytes: int  # x and the output
    flops: int  # of the convolution

    @classmethod
    def make(cls, B: int, shape: tuple[int, int, int, int], device: torch.device) -> "_Maps":
        C, Co, K, n = shape
        x, grad = (
            torch.randn(B, channels, n, n, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
            for channels in (C, Co)
        )
        words = f"[{B}, {C}, {n}, {n}] to {Co}, {K}x{K}"
        return cls(x.requires_grad_(), grad, words, x.nbytes + grad.nbytes, 2 * K * K * C * grad.numel())

    def cases(
        self,
        operator: str,
        what: str,
        run: Callable[..., Tensor],
        parameters: list[Tensor],
        more_flops: int = 0,
    ) -> Iterator[Case]:
        """`run(x, *parameters)` without gradients, and with all of them."""

        def forward() -> Tensor:
            with torch.no_grad():
                return run(self.x, *parameters)

        def both() -> tuple[Tensor, ...]:
            wanted = [self.x, *(p for p in parameters if p.requires_grad)]
            return torch.autograd.grad(run(self.x, *parameters), wanted, self.grad)

        flops, own = self.flops + more_flops, sum(p.nbytes for p in parameters)
        common = (self.words, torch.bfloat16, "channels_last")
        yield Case(operator, f"{what}, forward", *common, forward, self.bytes + own, flops)
        # Backward reads x, grad and the parameters again, and writes a gradient for x and for the parameters.
        moved = 2 * self.bytes + self.x.nbytes + 3 * own
        yield Case(operator, f"{what}, forward + backward", *common, both, moved, 3 * flops)


def _parameter(*size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=device, dtype=dtype).mul_(0.05).requires_grad_()


def static_cases(device: torch.device) -> Iterator[Case]:
    """The ordinary convolutions that the following are compared with."""
    for B in BATCHES:
        for shape in (*THREE_BY_THREE, *POINTWISE):
            C, Co, K, _ = shape
            weight = _parameter(Co, C, K, K, device=device, dtype=torch.bfloat16)
            weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            maps = _Maps.make(B, shape, device)
            yield from maps.cases("static", "conv2d", lambda x, w, K=K: F.conv2d(x, w, None, 1, K // 2), [weight])


def mixed_cases(device: torch.device) -> Iterator[Case]:
    for B in BATCHES:
        for shape in (*THREE_BY_THREE, *POINTWISE):
            C, Co, K, _ = shape
            attention = torch.rand(B, KERNELS, device=device).softmax(1).requires_grad_()
            kernels = _parameter(KERNELS, Co, C, K, K, device=device)

            def run(x: Tensor, attention: Tensor, kernels: Tensor, pad: int = K // 2) -> Tensor:
                return mixed_conv2d(x, attention, kernels, padding=(pad, pad))

            mixing = 2 * B * kernels.numel()
            maps = _Maps.make(B, shape, device)
            yield from maps.cases("mixed_conv2d", "mixed_conv2d", run, [attention, kernels], mixing)


def factored_cases(device: torch.device) -> Iterator[Case]:
    for B in BATCHES:
        for shape in (*THREE_BY_THREE, *POINTWISE):
            C, Co, K, _ = shape
            weight = _parameter(Co, C, K, K, device=device)
            gates = [_parameter(B, size, 1, device=device) for size in (C, K * K, Co)]

            def run(x: Tensor, weight: Tensor, *gates: Tensor, pad: int = K // 2) -> Tensor:
                return factored_conv2d(x, weight, *gates, padding=(pad, pad))

            yield from _Maps.make(B, shape, device).cases("factored_conv2d", "factored_conv2d", run, [weight, *gates])


def per_sample_cases(device: torch.device) -> Iterator[Case]:
    """Weights of their own for every sample, which must be read: also depthwise ones."""
    B = BATCHES[0]
    for shape, groups in [(THREE_BY_THREE[1], 1), (THREE_BY_THREE[2], 1), *((s, 1) for s in POINTWISE[2:])] + [
        (shape, shape[0]) for shape in THREE_BY_THREE[:2]
    ]:
        C, Co, K, _ = shape
        maps = _Maps.make(B, shape, device)
        maps = maps._replace(flops=maps.flops // groups, words=maps.words + (", depthwise" if groups > 1 else ""))
        weight = _parameter(B, Co, C // groups, K, K, device=device, dtype=torch.bfloat16)

        def run(x: Tensor, weight: Tensor, pad: int = K // 2, groups: int = groups) -> Tensor:
            return per_sample_conv2d(x, weight, padding=(pad, pad), groups=groups)

        yield from maps.cases("per_sample_conv2d", "per_sample_conv2d", run, [weight])


def dcd_cases(device: torch.device) -> Iterator[Case]:
    """DCD's layer in training mode, its forward also in eval mode; and the layer that it replaces."""
    for B in BATCHES:
        for shape in (*THREE_BY_THREE, *POINTWISE):
            C, Co, K, n = shape
            maps = _Maps.make(B, shape, device)
            layers = {
                "nn.Conv2d": nn.Conv2d(C, Co, K, padding=K // 2, bias=False),
                "DCDConv2d": DCDConv2d(C, Co, K, padding=K // 2, bias=False),
            }
            for what, layer in layers.items():
                layer.to(device, memory_format=torch.channels_last)

                def run(x: Tensor, *parameters: Tensor, layer: nn.Module = layer) -> Tensor:
                    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
                        return layer.train(torch.is_grad_enabled())(x)

                L = getattr(layer, "latent_dim", 0)  # Q, Phi, P
                yield from maps.cases("dcd", what, run, list(layer.parameters()), 2 * B * n * n * L * (C + L + Co))


OPERATORS = {
    "ddf": ddf_cases,
    "sparse": sparse_cases,
    "static": static_cases,
    "mixed_conv2d": mixed_cases,
    "factored_conv2d": factored_cases,
    "per_sample_conv2d": per_sample_cases,
    "dcd": dcd_cases,
}
