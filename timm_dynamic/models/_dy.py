"""What the networks with attention over convolution kernels share."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_dynamic.layers import DynamicConv2d
from timm_dynamic.layers.progress import share_progress
from timm_dynamic.models._cfg import imagenet_cfg


def make_dynamic(
    model: nn.Module, num_kernels: int | Sequence[int] = 4, reduction: int = 4, anneal_steps: int | None = None
) -> None:
    """Make every convolution of a new model dynamic, but the first one and those of squeeze-and-excitation.

    Kernels are initialised one by one as timm does it in all networks that come here: normal, by the fan-out.

    Args:
        model: With `nn.Conv2d`s; changed in place.
        num_kernels: For all convolutions, or one number for each in the order of the modules: in a residual block
            conv1, conv2, ..., shortcut.
        reduction: As for `DynamicConv2d`.
        anneal_steps: The temperature of the attention falls from 30 to 1 over so many training forwards; without it, it
            is 1 (unless `set_progress` is called).

    Raises:
        ValueError: If an argument has an unusable value, or a convolution cannot be replaced.
    """
    check_steps(anneal_steps)
    _, *names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    names = [name for name in names if "se" not in name.split(".")]
    numbers = [num_kernels] * len(names) if isinstance(num_kernels, int) else list(num_kernels)
    if len(numbers) != len(names):
        raise ValueError(f"num_kernels must have a number for each of {len(names)} convolutions, got {len(numbers)}")
    for name, number in zip(names, numbers, strict=True):
        conv = model.get_submodule(name)
        layer = DynamicConv2d.from_conv(conv, from_scratch=True, num_kernels=number, reduction=reduction)
        fan_out = layer.out_channels * layer.kernels_weights[0, 0, 0].numel() // layer.groups
        nn.init.normal_(layer.kernels_weights, std=(2 / fan_out) ** 0.5)
        model.set_submodule(name, layer)
    anneal(model, anneal_steps)


def check_steps(anneal_steps: int | None) -> None:
    if anneal_steps is not None and anneal_steps < 1:
        raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")


def anneal(model: nn.Module, anneal_steps: int | None) -> None:
    """Give the dynamic convolutions of a new model one schedule, which begins if it has a number of steps."""
    progress = share_progress(model)
    if progress is not None and anneal_steps is not None:
        progress.begin(anneal_steps)


def dy_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {"origin_url": "https://github.com/TArdelean/DynamicConvolution", "paper_ids": "arXiv:1912.03458"}
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})
