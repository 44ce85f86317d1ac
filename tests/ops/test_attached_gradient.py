"""The operator that starts the backward pass of an attached loss."""

import pytest
import torch

import timm_dynamic  # noqa: F401 - defines the operator

OPERATOR = torch.ops.timm_dynamic.attached_gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_formula(dtype):
    gradient = OPERATOR(torch.full((2, 3), torch.nan), torch.tensor(65536.0), 0.25, dtype)
    assert gradient.dtype == dtype and gradient.shape == () and gradient.item() == 16384


def test_opcheck():
    torch.library.opcheck(OPERATOR.default, (torch.randn(2, 3), torch.tensor(3.0), 0.5, torch.float32))
