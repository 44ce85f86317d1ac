"""The cells that the layers of a network mix their kernels of, and how a network has them once.

Li and Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution", ICML 2024 (arXiv 2406.07879).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from timm_dynamic.layers.argument_types import check_types
from timm_dynamic.layers.shared_part import SharedPart, all_names


class Warehouse(SharedPart):
    """Matrices, of which the taps of all kernels of several layers are mixed: `cells`, `[N, O, I]`.

    Several layers have it as their part, so that PyTorch's `fully_shard` wants it before them, by itself.

    Args:
        convs: The convolutions, or layers like them, whose kernels are made of the cells.
        cell_num_ratio: N over the number of mixtures of all these, an integer or one over an integer.
        cell_out_ratio, cell_in_ratio: O over the greatest common divisor of their outputs, and I over that of their
            inputs (of a group), both at least 1.

    Attributes:
        taken: The number of cells that layers have begun with so far; each takes the next ones.

    Raises:
        ValueError: If the ratios fit neither each other nor the convolutions.
    """

    def __init__(
        self,
        convs: Sequence[nn.Module],
        cell_num_ratio: float = 1,
        cell_out_ratio: float = 1,
        cell_in_ratio: float = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        ratios = {"cell_num_ratio": cell_num_ratio, "cell_out_ratio": cell_out_ratio, "cell_in_ratio": cell_in_ratio}
        check_types(Warehouse, ratios)
        if cell_num_ratio <= 0 or (cell_num_ratio != int(cell_num_ratio) and 1 / cell_num_ratio % 1 != 0):
            raise ValueError(f"cell_num_ratio must be an integer, or one over an integer, got {cell_num_ratio}")
        outputs = math.gcd(*(conv.out_channels for conv in convs))
        inputs = math.gcd(*(conv.in_channels // conv.groups for conv in convs))
        self.cell_num_ratio, self.taken = cell_num_ratio, 0
        self.outputs, self.inputs = max(int(outputs * cell_out_ratio), 1), max(int(inputs * cell_in_ratio), 1)
        if outputs % self.outputs or inputs % self.inputs:
            raise ValueError(
                f"cells of {self.outputs} outputs and {self.inputs} inputs do not divide kernels of {outputs} and "
                f"{inputs}: choose another cell_out_ratio and cell_in_ratio"
            )
        mixtures = sum(math.prod(self.grid(conv)) for conv in convs)
        shape = (max(int(mixtures * cell_num_ratio), 1), self.outputs, self.inputs)
        self.cells = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if (needed := sum(self.count(math.prod(self.grid(conv))) for conv in convs)) != shape[0]:
            raise ValueError(
                f"the kernels begin with {needed} of {shape[0]} cells: with a cell_num_ratio of {cell_num_ratio}, the "
                f"numbers of their parts must be multiples of {round(1 / cell_num_ratio)}"
            )

    def grid(self, conv: nn.Module) -> tuple[int, int, int]:
        """Of how many cells a kernel is made: by taps, outputs and inputs of a group."""
        inputs = conv.in_channels // conv.groups
        return math.prod(conv.kernel_size), conv.out_channels // self.outputs, inputs // self.inputs

    def count(self, mixtures: int) -> int:
        """With how many cells a layer begins."""
        if self.cell_num_ratio >= 1:
            return mixtures * int(self.cell_num_ratio)
        return int(_has_cell(mixtures, round(1 / self.cell_num_ratio)).sum())

    def take(self, mixtures: int) -> slice:
        """The next cells, for a layer to begin with."""
        start = self.taken
        self.taken += self.count(mixtures)
        return slice(start, self.taken)

    def first_cells(self, start: int, mixtures: int) -> Tensor:
        """The cell that each mixture of a layer begins as; N, which is none, for some if there are fewer cells."""
        if self.cell_num_ratio >= 1:
            return start + torch.arange(mixtures, device="cpu") * int(self.cell_num_ratio)
        has_cell = _has_cell(mixtures, round(1 / self.cell_num_ratio))
        return torch.where(has_cell, start + has_cell.cumsum(0) - 1, len(self.cells))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Mixtures, `[..., O, I]`, of all cells: coefficients are `[..., N]`."""
        mixed = torch.matmul(coefficients.to(self.cells.dtype), self.cells.flatten(1))
        return mixed.unflatten(-1, (self.outputs, self.inputs))

    def extra_repr(self) -> str:
        return f"cells={list(self.cells.shape)}, cell_num_ratio={self.cell_num_ratio}"


def _has_cell(mixtures: int, share: int) -> Tensor:
    i = torch.arange(mixtures, device="cpu")
    return i % share == i // share % share


def stages(pairs: dict[str, tuple[nn.Conv2d, nn.Module]]) -> list[list[tuple[nn.Conv2d, nn.Module]]]:
    """Which layers of a network share a warehouse: those of a stage, depthwise ones and others apart.

    A stage is what the first number in a module's name counts: `layer2` or `stages.1`. It has several warehouses where
    one would be of such small cells that the attention to them had more weights than the kernels.

    Args:
        pairs: By their names, in the order of the network's modules, convolutions and the layers in their place.
    """
    groups: dict[tuple, list[list]] = {}
    for name, (conv, layer) in pairs.items():
        parents = name.split(".")[:-1]
        numbered = next((i for i, part in enumerate(parents) if re.search(r"\d", part)), len(parents) - 1)
        depthwise = conv.groups > 1 and conv.groups == conv.in_channels
        place = (*parents[: numbered + 1], depthwise, conv.weight.device, conv.weight.dtype)
        found = groups.setdefault(place, [[]])
        if found[-1] and not depthwise and _is_too_fine([*found[-1], (conv, layer)]):
            found.append([])
        found[-1].append((conv, layer))
    return [group for found in groups.values() for group in found]


def _is_too_fine(group: list[tuple[nn.Conv2d, nn.Module]]) -> bool:
    """Whether the attention of so many layers to one warehouse would have more weights than their kernels."""
    ratio = group[0][1].warehouse.cell_num_ratio
    with torch.device("meta"):
        warehouse = Warehouse([conv for conv, _ in group], ratio)
    cells, outputs, inputs = warehouse.cells.shape
    hidden = max(layer.attention.fc1.out_features for _, layer in group)
    return hidden * (cells + 1) > outputs * inputs * max(ratio, 1)


class Warehouses(nn.ModuleDict):
    """All of a network, which the layers have too; the first of its parts, so that state dicts begin with the cells.

    As a step of a network that is cut into its parts it does nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


def put_first(model: nn.Module, warehouses: Iterable[Warehouse]) -> None:
    """Make the warehouses of a new network its first part."""
    others = dict(model._modules)
    model._modules.clear()
    model.warehouses = Warehouses({str(i): warehouse for i, warehouse in enumerate(warehouses)})
    model._modules.update(others)


def save_warehouses_once(model: nn.Module) -> None:
    """Let state dicts of a network have the cells that several of its layers share once, by their first name.

    Args:
        model: With all of its layers, as an extractor of features that has less of them. It loses the warehouses that
            no layer has.
    """
    if any(isinstance(module, Warehouse) for module in model.modules()):
        drop_unused(model)
        model.register_state_dict_post_hook(_save)
        model.register_load_state_dict_pre_hook(_load)


def drop_unused(model: nn.Module) -> None:
    """Take the warehouses that no layer has any more out of a network."""
    used = {
        module
        for name, module in all_names(model)
        if isinstance(module, Warehouse) and name.split(".")[0] != "warehouses"
    }
    for name, module in list(getattr(model, "warehouses", {}).items()):
        if module not in used:
            del model.warehouses[name]


def _other_names(model: nn.Module, prefix: str) -> Mapping[str, str]:
    """The first key of every cells in a state dict, by every other one."""
    first, others = {}, {}
    for name, module in all_names(model):
        if isinstance(module, Warehouse):
            key = f"{prefix}{name}.cells"
            if first.setdefault(module, key) != key:
                others[key] = first[module]
    return others


def _save(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _) -> None:
    for other in _other_names(model, prefix):
        state_dict.pop(other, None)


def _load(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    for other, first in _other_names(model, prefix).items():
        if first in state_dict:
            state_dict.setdefault(other, state_dict[first])
