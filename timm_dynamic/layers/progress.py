"""How far training is, for what changes in its course."""

import torch
from torch import Tensor, nn

_UNIT = 2**40  # integers: a cast of the model leaves them alone


class Progress(nn.Module):
    """The share of the training that is done, from 0 to 1, as a tensor, so that torch.compile need not compile again.

    It is what `timm_dynamic.set_progress` said last; else it follows from a step counter, if there is one; else it is
    0. One is shared by all parts of a model.
    """

    def __init__(self, device=None):
        super().__init__()
        self.register_buffer("told", torch.full((), -1, dtype=torch.int64, device=device), persistent=False)
        self._counting: tuple[nn.Module, int] | None = None

    def count(self, counter: nn.Module, total_steps: int) -> None:
        """Follow the number of training forwards in `counter.step`, of `total_steps` in all."""
        self._counting = (counter, total_steps)  # in a tuple, so that the counter is no submodule

    def set_progress(self, epoch: float, epochs: float) -> None:
        """See `timm_dynamic.set_progress`."""
        self.told.fill_(round(min(epoch / epochs, 1.0) * _UNIT))

    @torch.jit.unused
    def forward(self) -> Tensor:
        """The share, float64."""
        told = self.told.double() / _UNIT
        if self._counting is None:
            return told.clamp(min=0)
        counter, steps = self._counting
        # A training forward has counted itself already.
        counted = ((counter.step - int(self.training)).double() / steps).clamp(0, 1)
        return torch.where(told < 0, counted, told)
