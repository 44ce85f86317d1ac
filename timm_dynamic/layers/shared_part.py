"""Modules that several layers of a network have as their part."""

from collections.abc import Iterator

from torch import nn


class SharedPart(nn.Module):
    """A module with several names in a network, which lists it under the first one alone, whatever it is asked.

    `torch.func.functional_call` swaps the tensors of all names that are listed, and puts them back in the same order:
    with a second name of one module, it would put back what the call was given.
    """

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True):
        return super().named_modules(memo, prefix)


def all_names(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules within a model, with each of their names."""
    for name, module in model._modules.items():
        if module is not None:
            yield prefix + name, module
            yield from all_names(module, f"{prefix}{name}.")
