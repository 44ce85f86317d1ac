"""Copies of networks for inference, without the batch norms that a convolution can take over."""

import copy
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def foldable_pairs(model: nn.Module, shared: Iterable[nn.Module] = ()) -> list[tuple[nn.Module, str, str]]:
    """The convolutions that a batch norm follows at once, in the order of definition.

    Args:
        model: Whose modules run in the order in which they are defined.
        shared: Parts to leave out.

    Returns:
        The module they are in, and the names of both.
    """
    left_out = {id(module) for part in shared for module in part.modules()}
    pairs = []
    for parent in model.modules():
        children = [] if id(parent) in left_out else list(parent.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                pairs.append((parent, name, norm_name))
    return pairs


def folded_copy(model: nn.Module, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy of a model in eval mode in which convolutions have taken over the batch norms behind them.

    All other parameters and buffers are those of the model itself.

    Args:
        model: As for `foldable_pairs`.
        shared: Parts that the copy has as they are.
    """
    memo = {id(item): item for item in (*shared, *model.parameters(), *model.buffers())}
    folded = copy.deepcopy(model, memo)
    for parent, name, norm_name in foldable_pairs(folded, shared):
        norm = getattr(parent, norm_name)
        setattr(parent, name, fuse_conv_bn_eval(getattr(parent, name), norm))
        setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))  # timm's have their activation within
    return folded


def tensors_of(pairs: Iterable[tuple[nn.Module, str, str]]) -> list[Tensor]:
    """The parameters and buffers of pairs."""
    modules = [getattr(parent, name) for parent, *names in pairs for name in names]
    return [tensor for module in modules for tensor in (*module.parameters(False), *module.buffers(False))]
