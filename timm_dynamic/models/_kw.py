"""What the networks of KernelWarehouse share."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.layers import KWConv2d, Warehouse
from timm_dynamic.layers.progress import share_progress
from timm_dynamic.layers.warehouse import put_first, save_warehouses_once
from timm_dynamic.models._cfg import imagenet_cfg

_RATIOS = ("cell_num_ratio", "cell_out_ratio", "cell_in_ratio")
_OPTIONS = (*_RATIOS, "reduction", "basis_ratio", "anneal_epochs", "anneal_steps")


def split_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take those of `make_dynamic` out of a model's arguments."""
    return {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}


def make_dynamic(
    model: nn.Module,
    places: Mapping[str, Hashable],
    order: Iterable[Hashable] = (),
    ratios: Mapping[Hashable, tuple[float, float, float]] | None = None,
    anneal_steps: int | None = None,
    **options,
) -> None:
    """Make convolutions of a new model dynamic.

    Args:
        model: With `nn.Conv2d`s; changed in place. Its first part holds the warehouses.
        places: By the name of each of them, in the order of the modules, the key of its warehouse.
        order: The first keys in state dicts; others follow as they come in `places`.
        ratios: cell_num_ratio, cell_out_ratio and cell_in_ratio of warehouses that have others than `options` say.
        anneal_steps: The training forwards in which the share of the initial mixtures falls from 1 to 0; without it,
            it is 0 (unless `set_progress` is called).
        options: Of the warehouses and of `KWConv2d`.

    Raises:
        ValueError: If an argument has an unusable value.
    """
    if anneal_steps is not None and anneal_steps < 1:
        raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")
    common = tuple(options.pop(name, 1) for name in _RATIOS)
    warehouses = {}
    for key in dict.fromkeys((*order, *places.values())):
        convs = [model.get_submodule(name) for name, place in places.items() if place == key]
        dd = {"device": convs[0].weight.device, "dtype": convs[0].weight.dtype}
        warehouses[key] = Warehouse(convs, *(ratios or {}).get(key, common), **dd)
    for name, key in places.items():
        model.set_submodule(name, _in_place_of(model.get_submodule(name), warehouse=warehouses[key], **options))
    put_first(model, warehouses.values())
    save_warehouses_once(model)
    progress = share_progress(model)
    if anneal_steps is not None:
        progress.begin(anneal_steps)


def _in_place_of(conv: nn.Conv2d, **options) -> KWConv2d:
    return KWConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **options,
    )


def load_authors(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, with our names of the warehouses; ours as they are."""
    if state_dict.keys() <= model.state_dict().keys():
        return state_dict
    found = {}
    for key, value in extract_state_dict(state_dict).items():
        index = key.removeprefix("warehouse_manager.weights.")
        found[key if index == key else f"warehouses.{index}.cells"] = value if index == key else packed(value)
    return found


def fitting(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Pretrained weights for a network of other input channels or classes than theirs, with a dynamic stem.

    Args:
        state: Its weights with more or less input channels are adapted as timm does it; what else is of another shape
            is left out, which only a network of other classes is loaded without.
        model: As it is to be loaded.
    """
    model_state, found = model.state_dict(), {}
    for key, value in state.items():
        shape = model_state[key].shape if key in model_state else value.shape
        if shape == (*value.shape[:-1], model.in_chans) != value.shape:
            weight = adapt_input_conv(model.in_chans, value.flatten(0, -2)[:, :, None, None], value.shape[-1])
            value = weight.view(shape)
        if shape == value.shape:
            found[key] = value
    return found


def packed(cells: Tensor) -> Tensor:
    """Theirs are `[N, O, I, 1, 1]`."""
    return cells.flatten(2) if cells.ndim == 5 else cells


def kw_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {"origin_url": "https://github.com/OSVAI/KernelWarehouse", "paper_ids": "arXiv:2406.07879"}
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})
