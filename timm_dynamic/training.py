"""Training: the auxiliary losses that models carry."""

from torch import Tensor, nn

from timm_dynamic.layers.auxiliary import attach_loss

__all__ = ["attach_loss", "auxiliary_loss"]


def auxiliary_loss(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary loss terms of the last training forward, weighted, by `<layer>.<term>`.

    These are values, to be logged or added to a loss that is reported. Their gradients are attached inside the model
    already (see `attach_loss`): adding the terms to the loss before `backward()` is allowed and changes no gradient.

    Args:
        model: Any model. The terms are 0 before its first training forward.
    """
    return {
        f"{name}.{term}" if name else term: getattr(module, term).clone()
        for name, module in model.named_modules()
        for term in getattr(module, "auxiliary_terms", ())
    }


def set_progress(model: nn.Module, epoch: float, epochs: float) -> None:
    """Tell the layers with a schedule of their own how far training is; call it before every epoch, or more often.

    Call it on an averaged copy of the model too, if that is evaluated.

    Args:
        model: Any model, wrapped or not.
        epoch: Epochs done, from 0; may be fractional.
        epochs: In the whole training.

    Raises:
        ValueError: If `epoch` is negative or `epochs` not positive.
    """
    if epoch < 0 or epochs <= 0:
        raise ValueError(f"epoch must not be negative and epochs must be positive, got {epoch} and {epochs}")
    for module in model.modules():
        if hasattr(module, "set_progress"):
            module.set_progress(epoch, epochs)
