"""A norm in eval mode and a clamp, in place, against plain PyTorch."""

import math

import pytest
import torch

from timm_dynamic.ops import affine_reference_, backend_info

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")


@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 9), (1, 64, 1, 1), (3, 1, 33, 17), (0, 4, 5, 5), (4, 200, 14, 14)], ids=str
)
@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0)], ids=str)
def test_equals_the_reference(shape, limits):
    torch.manual_seed(0)
    y, scale, shift = torch.randn(shape) * 5, torch.randn(shape[1]), torch.randn(shape[1])
    expected = y.double()
    affine_reference_(expected, scale.double(), shift.double(), *limits)
    torch.ops.timm_dynamic.affine_(y, scale, shift, *limits)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)


def test_nan_stays():
    y = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).view(1, 1, 2, 2)
    torch.ops.timm_dynamic.affine_(y, torch.ones(1), torch.ones(1), 0.0, 6.0)
    assert y.isnan().flatten().tolist() == [True, False, False, False]
    assert y.flatten()[1:].tolist() == [6, 0, 2]


def test_opcheck():
    args = (torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3), 0.0, 6.0)
    torch.library.opcheck(torch.ops.timm_dynamic.affine_.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, s, t: (y.to(memory_format=torch.channels_last), s, t), "y must be"),
        (lambda y, s, t: (y.double(), s, t), "y must be"),
        (lambda y, s, t: (y, s[:2].clone(), t), "scale must be 3"),
        (lambda y, s, t: (y, s, t.double()), "shift must be 3"),
    ],
    ids=["channels_last", "double", "scale", "shift"],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.timm_dynamic.affine_(*change(torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)), 0.0, 6.0)
