"""What several tests of operators need."""

import pytest
import torch


@pytest.fixture
def calls_of(monkeypatch):
    """`calls_of(*names)` is a list to which every call of these operators adds its name from then on."""

    def watch(*names):
        calls = []
        for name in names:
            operator = getattr(torch.ops.timm_dynamic, name)
            counted = lambda *args, name=name, operator=operator: calls.append(name) or operator(*args)  # noqa: E731
            monkeypatch.setattr(torch.ops.timm_dynamic, name, counted, raising=False)
        return calls

    return watch
