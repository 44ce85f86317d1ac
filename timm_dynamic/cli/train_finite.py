"""Losses that are not finite: `timm-dynamic train` stops, or skips the update."""

import argparse
import logging

import torch
from torch import Tensor, nn

_logger = logging.getLogger("timm_dynamic.cli.train")  # whose level the command sets

_KINDS = (None, "infinite", "nan")
_SHOWN = 4  # of what is not finite


class FiniteGuard:
    """Looks at the loss and the auxiliary terms of each update.

    Without `--skip-nonfinite` it looks one update late, at a copy that was under way meanwhile, so that the device is
    not waited for. A bad update has changed the weights by then, but nothing has been saved since.

    With it the answer is needed before the update, which waits for the device once an update, and the BatchNorm
    statistics that the bad forward pass has spoilt are needed as they were before, which takes a copy of the model's
    floating-point buffers. A GradScaler's own skipping of infinite gradients, with a finite loss, is not counted.

    Several processes skip or stop together.

    Args:
        model: The model, unwrapped.
        args: With `skip_nonfinite` and `distributed`.
    """

    def __init__(self, model: nn.Module, args: argparse.Namespace):
        self.model, self.limit, self.distributed = model, args.skip_nonfinite, args.distributed
        self.skipped = 0
        self._pending: tuple | None = None
        self.start()

    def start(self) -> None:
        """Before the first batch of an update."""
        self._codes: Tensor | None = None
        if self.limit:
            self._saved = [(buffer, buffer.clone()) for buffer in self.model.buffers() if buffer.is_floating_point()]

    def watch(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """After a forward pass.

        Args:
            loss: The task's loss, a scalar.
            terms: Scalars, by name.
        """
        values = torch.stack([value.detach().float() for value in (loss, *terms.values())])
        codes = values.isinf() + 2 * values.isnan()
        self._names = ["the task's loss", *terms]
        self._codes = codes if self._codes is None else torch.maximum(self._codes, codes)

    def skips(self, where: str) -> bool:
        """Whether to skip an update, asked before its last backward pass; the buffers are as before it then.

        Args:
            where: Of the update, for messages.

        Raises:
            ValueError: More updates than allowed, or weights that are not finite.
        """
        if not self.limit:
            return False
        problem = self._problem(self._names, self._reduced().tolist())
        if not problem:
            return False
        for buffer, saved in self._saved:
            buffer.copy_(saved)
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{where}: {problem}, and {name} is not finite either, so that skipping does not help")
        self.skipped += 1
        if self.skipped > self.limit:
            raise ValueError(f"{where}: {problem}, after {self.limit} skipped updates (--skip-nonfinite)")
        _logger.warning(f"{where}: {problem}; update skipped, {self.skipped} of {self.limit} (--skip-nonfinite)")
        return True

    def note(self, where: str) -> None:
        """After an update: have it looked at in the next."""
        if self.limit:
            return
        codes, event = self._reduced(), None
        if codes.is_cuda:
            codes, event = codes.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.look()
        self._pending = where, self._names, codes, event

    def look(self) -> None:
        """Look at what `note` noted last.

        Raises:
            ValueError: A loss or term was not finite.
        """
        if not self._pending:
            return
        (where, names, codes, event), self._pending = self._pending, None
        if event:
            event.synchronize()
        if problem := self._problem(names, codes.tolist()):
            raise ValueError(
                f"{where}: {problem}. Checkpoints of earlier epochs are intact; --skip-nonfinite N skips N such updates"
            )

    def _reduced(self) -> Tensor:
        if self.distributed:
            torch.distributed.all_reduce(self._codes, torch.distributed.ReduceOp.MAX)
        return self._codes

    @staticmethod
    def _problem(names: list[str], codes: list[int]) -> str:
        bad = [f"{name} is {_KINDS[code]}" for name, code in zip(names, codes, strict=True) if code]
        return ", ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
