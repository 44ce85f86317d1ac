"""`python -m timm_dynamic.run [--optimize] SCRIPT ARGS...`: run a Python script unchanged, with our models in timm.

With `--optimize`, a model that the script makes by `timm.create_model` runs as its inference copy (see
`timm_dynamic.optimize`), made at its first forward in eval mode without gradients, of the weights that it has then.
That is for scripts that validate, benchmark or predict: a script that trains such a model ends with an error.
"""

import functools
import os
import runpy
import sys

import timm
import torch
from torch import nn

from timm_dynamic import optimize  # which also registers our models

_USAGE = "(usage: python -m timm_dynamic.run [--optimize] SCRIPT ARGS...)"


def main() -> None:
    del sys.argv[0]
    if sys.argv and sys.argv[0] == "--optimize":
        del sys.argv[0]
        _optimize_created()
    if not sys.argv or not os.path.isfile(sys.argv[0]):
        problem = f"no such script: {sys.argv[0]}" if sys.argv else "name a script"
        sys.exit(_fail(f"{problem} {_USAGE}"))
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))  # as `python SCRIPT` has it
    runpy.run_path(sys.argv[0], run_name="__main__")


def _optimize_created() -> None:
    """From now on, `timm.create_model` gives models that run as their inference copies."""
    create = timm.create_model

    @functools.wraps(create)
    def create_model(*args, **kwargs) -> nn.Module:
        model = create(*args, **kwargs)
        model.__class__ = type(type(model).__name__, (_RunsOptimized, type(model)), {"__module__": __name__})
        return model

    for module in (timm, timm.models, timm.models._factory):
        module.create_model = create_model


class _RunsOptimized(nn.Module):
    """Mixin of models that run as their inference copies in eval mode without gradients, but when they are compiled."""

    _copy = None

    def __call__(self, *args, **kwargs):
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or kwargs:
            return super().__call__(*args, **kwargs)
        if self._copy is None:
            object.__setattr__(self, "_copy", self._optimized(args))  # not a submodule
            print(f"timm_dynamic.run: optimized {self._name}\n{self._copy.report}", file=sys.stderr)
        return self._copy(*args)

    @property
    def _name(self) -> str:
        config = getattr(self, "pretrained_cfg", None) or {}
        return config.get("architecture") or type(self).__name__

    def _optimized(self, inputs: tuple) -> nn.Module:
        kind = type(self)
        self.__class__ = kind.__mro__[2]  # that of the model itself
        try:
            return optimize(self, inputs)
        finally:
            self.__class__ = kind

    def train(self, mode: bool = True):
        if mode and self._copy is not None:
            raise ValueError("run with --optimize is for scripts that do not train: leave it out")
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        object.__setattr__(self, "_copy", None)
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        object.__setattr__(self, "_copy", None)
        return super().load_state_dict(*args, **kwargs)


def _fail(message: str) -> int:
    print(f"timm_dynamic.run: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
