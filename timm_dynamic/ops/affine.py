"""`affine_`: a batch norm in eval mode, and the clamp behind it, in the place of the map, for inference.

    y = clamp(scale * y + shift)

PyTorch's own give a new map, whose memory often is mapped afresh, and read it once more for the activation.
"""

import math

import torch
from torch import Tensor

from timm_dynamic.ops._library import NAMESPACE

NO_LIMITS = (-math.inf, math.inf)
NO_NORM = (None, None, *NO_LIMITS)  # scale, shift and limits


def affine_reference_(y: Tensor, scale: Tensor, shift: Tensor, low: float, high: float) -> None:
    """Defines the operator `torch.ops.timm_dynamic.affine_`, which writes into `y`.

    Args:
        y: `[B, C, H, W]`.
        scale, shift: `[C]`.
        low, high: Limits of the result.
    """
    y.mul_(scale[:, None, None]).add_(shift[:, None, None]).clamp_(low, high)


def affine(y: Tensor, scale: Tensor | None, shift: Tensor | None, low: float, high: float) -> Tensor:
    """The same as a new map, for operators that end with it; None: no scale or shift."""
    y = y if scale is None else y * scale[:, None, None]
    return (y if shift is None else y + shift[:, None, None]).clamp(low, high)


torch.library.define(
    f"{NAMESPACE}::affine_",
    "(Tensor(a!) y, Tensor scale, Tensor shift, float low, float high) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::affine_", "CompositeExplicitAutograd")(affine_reference_)


@torch.library.register_fake(f"{NAMESPACE}::affine_")
def _affine_fake(*args):
    return None
