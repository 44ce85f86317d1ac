"""KernelWarehouse: kernels whose parts are mixtures of cells that the layers of a stage share.

Li and Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution", ICML 2024 (arXiv 2406.07879). The parts of
the attention are named as the authors'.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_dynamic.layers.absorbed_norms import fold
from timm_dynamic.layers.base import AffineOutputs, check_positive, in_dtype_of, parts_of
from timm_dynamic.layers.cell_attention import CellAttention
from timm_dynamic.layers.progress import Progress
from timm_dynamic.layers.warehouse import Warehouse, stages
from timm_dynamic.ops import sample_conv2d
from timm_dynamic.ops.pooled_heads.definition import average
from timm_dynamic.ops.sample_conv.table import ASSEMBLED

_SMALLEST = 1e-3  # is added to what scores are divided by
# The score of a cell with which a layer starts that takes the place of a convolution: the others' first steps, with
# Adam as large as those of the cells, are divided by it.
_CERTAIN = 16.0


def _annealed(anneal_epochs: int, epoch: float, epochs: float) -> float:
    # Until tau is 0 evaluation, where it is, is near chance: over all of eight epochs of CIFAR-10 it fell for 68.9 % in
    # the end, over two of them for 76.4 % (dynconv_resnet8 with these layers, November 2026).
    return epoch / min(anneal_epochs, epochs / 4)


@register_notrace_module
class KWConv2d(AffineOutputs):
    """Convolution whose kernel is, tap by tap and block by block, a mixture of a warehouse's cells for each sample.

    An output's rows of the cells are those of other outputs and layers, too, so that a norm is absorbed behind them.
    With scores q of all N cells, and one of none, the coefficients of a mixture are (equations 2 to 4)

        a_j = (1 - tau) q_j / (sum_i |q_i| + 1e-3) + tau [j is the cell that the mixture begins as]

    tau is 0. In training it can fall from 1 to 0, by epochs (`timm_dynamic.set_progress`) or by training forwards (a
    model's `anneal_steps`); in evaluation it is 0.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: As for `nn.Conv2d`.
        bias: A static one, added last.
        warehouse: That of several layers, which take its cells in the order in which they are made; None: a new one.
        cell_num_ratio: Of a new warehouse, cells over mixtures.
        reduction: The attention's hidden layer is `in_channels * reduction` wide and at least 16.
        basis_ratio: Below 1: scores of the cells that other layers begin with are linear in so many numbers for each of
            these cells, and at least in 16.
        layer_norm: Normalise the hidden layer by itself, not over the batch.
        anneal_epochs: In which tau falls; a quarter of the training at most.

    Shape:
        As for `nn.Conv2d`; the input must be batched.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    family = "kw"
    implementations = ASSEMBLED
    routing_limit = None  # it sums to 1, nearly
    shared = ("warehouse",)

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
        warehouse: Warehouse | None = None,
        cell_num_ratio: float = 1,
        reduction: float = 1 / 16,
        basis_ratio: float = 1.0,
        layer_norm: bool = False,
        anneal_epochs: int = 20,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        check_positive(anneal_epochs=anneal_epochs)
        for name, value in (("reduction", reduction), ("basis_ratio", basis_ratio)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        dd = {"device": device, "dtype": dtype}
        self.reduction, self.basis_ratio, self.layer_norm = reduction, basis_ratio, layer_norm
        self.add_outputs(bias, **dd)
        self.progress = Progress(True, partial(_annealed, anneal_epochs), device)
        self.number, self.smallest = 1, _SMALLEST  # for TorchScript
        self.enter(warehouse or Warehouse([self], cell_num_ratio, **dd))

    @torch.jit.unused
    def enter(self, warehouse: Warehouse) -> None:
        """Take the next cells of a warehouse, initialised by the fan-out, and a new attention to all of its cells."""
        self.grid = warehouse.grid(self)
        mixtures, cells = math.prod(self.grid), len(warehouse.cells)
        self.warehouse, local, basis = warehouse, warehouse.take(mixtures), 0
        others = cells - local.stop + local.start
        if self.basis_ratio < 1 and others:
            basis = max(int(others * self.basis_ratio), 16)
        hidden = max(int(self.in_channels * self.reduction), 16)
        dd = {"device": warehouse.cells.device, "dtype": warehouse.cells.dtype}
        self.attention = CellAttention(self.in_channels, hidden, mixtures, cells, local, basis, self.layer_norm, **dd)
        self.parts = ((Warehouse, "warehouse"), *parts_of("attention", self.attention))
        with torch.no_grad():
            first = warehouse.cells[local]
            first.normal_(std=math.sqrt(2 / max(first[:, :, 0].numel(), 1)))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, from_scratch: bool = False, **kwargs) -> "KWConv2d":
        """As in the base class; the cells of layers that take them from one warehouse are frozen if all layers are."""
        ratio = kwargs["warehouse"].cell_num_ratio if kwargs.get("warehouse") else kwargs.get("cell_num_ratio", 1)
        if ratio < 1 and not from_scratch:
            raise ValueError(
                f"with a cell_num_ratio of {ratio} there are less cells than parts of the kernel, which cannot all be "
                "that of the convolution: use an integer of at least 1, or from_scratch=True"
            )
        layer = super().from_conv(conv, from_scratch=from_scratch, **kwargs)
        layer.warehouse.cells.requires_grad_(from_scratch or conv.weight.requires_grad)
        return layer

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """The cells that the layer begins with are the parts of the kernel; any others are as in a new layer."""
        taps, outputs, inputs = self.grid
        parts = conv.weight.reshape(outputs, -1, inputs, self.warehouse.inputs, taps).permute(4, 0, 2, 1, 3)
        first = self.first_coefficients()
        self.warehouse.cells[first.argmax(1).to(conv.weight.device)] = parts.flatten(0, 2) * (1 + _SMALLEST / _CERTAIN)
        attention = self.attention
        scores = attention.fc2.bias if attention.fc3 is None else attention.basis_bias
        scores.copy_(_CERTAIN * first.flatten())
        attention.fc2.weight.zero_()

    @classmethod
    def unite(cls, pairs: dict[str, tuple[nn.Conv2d, "KWConv2d"]], from_scratch: bool) -> None:
        """The layers of a stage take their cells from one warehouse (see `stages`)."""
        for group in stages(pairs):
            device, dtype = group[0][0].weight.device, group[0][0].weight.dtype
            ratio = group[0][1].warehouse.cell_num_ratio
            warehouse = Warehouse([conv for conv, _ in group], ratio, device=device, dtype=dtype)
            warehouse.cells.requires_grad_(from_scratch or any(conv.weight.requires_grad for conv, _ in group))
            for conv, layer in group:
                layer.enter(warehouse)
                if not from_scratch:
                    layer.start_from(conv)
                layer.attention.train(layer.training)

    def formula(self, x: Tensor) -> Tensor:
        if self.training and not torch.jit.is_scripting():
            self.progress.count(self.number)
        coefficients = self.factors_of(average(x))
        options = (self.stride, self.zero_padding, self.dilation, self.groups)
        return self.finish(sample_conv2d(self.pad(x), self.kernels(coefficients), *options))

    def factors(self, pooled: Tensor) -> Tensor:
        """The coefficients of all cells, and of none: `[B, mixtures, N + 1]`."""
        if torch.jit.is_scripting():
            scores = self.attention(pooled.to(self.warehouse.cells.dtype))
        else:
            scores = in_dtype_of(pooled, self.attention)
        coefficients = self.coefficients(scores)
        return coefficients if torch.jit.is_scripting() or not self.training else self.towards_first(coefficients)

    def coefficients(self, scores: Tensor) -> Tensor:
        """Where tau is 0."""
        return scores / (scores.abs().sum(2, keepdim=True) + self.smallest)

    @torch.jit.unused
    def towards_first(self, coefficients: Tensor) -> Tensor:
        """By tau."""
        tau = self.progress.between(1.0, 0.0, True).to(coefficients.dtype)
        return torch.lerp(coefficients, self.first_coefficients().to(coefficients), tau)

    @torch.jit.unused
    def first_coefficients(self) -> Tensor:
        """Those with which a training begins: one cell, or none, for each mixture."""
        first = self.warehouse.first_cells(self.attention.local.start, math.prod(self.grid))
        return F.one_hot(first, len(self.warehouse.cells) + 1)

    def kernels(self, coefficients: Tensor) -> Tensor:
        """`[B, O, I, Kh, Kw]`: of each mixture a block of outputs and inputs at one tap."""
        blocks = self.warehouse(coefficients[:, :, :-1]).unflatten(1, self.grid)
        height, width = self.kernel_size
        blocks = blocks.permute(0, 2, 4, 3, 5, 1)
        return blocks.reshape(-1, self.out_channels, self.in_channels // self.groups, height, width)

    def routing(self, x: Tensor) -> Tensor:
        """For `timm_dynamic.record`: how much of every cell, and of none, there is in the mixtures, `[B, N + 1]`."""
        return self.factors_of(average(x)).abs().mean(1)

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        super()._absorb(scale, shift)
        fold(self, "attention.fc1", "attention.norm1")
