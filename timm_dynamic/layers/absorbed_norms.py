"""Norms of a layer that its own parts take over for inference, when the layer absorbs the norm behind it."""

from torch import nn

from timm_dynamic.ops.norms import affine, folded, has_statistics


def fold(layer: nn.Module, linear: str, norm: str) -> None:
    """Let a linear part of a layer absorb the norm behind it, if it can, in place and without gradients."""
    first, second = layer.get_submodule(linear), layer.get_submodule(norm)
    if has_statistics(second):
        weight, bias = folded(first, second)
        first.weight, first.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        _remove(layer, norm)


def fold_products(layer: nn.Module, linear: str, norm: str, behind: str) -> None:
    """Let a linear part, which makes a matrix a sample, absorb the norm of the products with the matrix, likewise.

    The norm's offset goes to the bias of the convolution `behind` them.
    """
    second, after = layer.get_submodule(norm), layer.get_submodule(behind)
    if has_statistics(second) and not isinstance(second, nn.Identity):
        slope, offset = affine(second)
        layer.get_submodule(linear).weight.unflatten(0, (len(slope), -1)).mul_(slope[:, None, None])
        after.bias.add_(after.weight.flatten(1) @ offset)
        _remove(layer, norm)


def _remove(layer: nn.Module, norm: str) -> None:
    layer.set_submodule(norm, nn.Identity().eval())
    layer.parts = tuple((nn.Identity, name) if name == norm else (kind, name) for kind, name in layer.parts)
