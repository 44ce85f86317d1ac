"""DynConv's mask unit as one operator, against its reference."""

import math

import pytest
import torch

from timm_dynamic.layers import MaskUnit
from timm_dynamic.ops import backend_info, mask_logits_reference

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")

OPERATOR = torch.ops.timm_dynamic.mask_logits
CASES = [  # B, C, H, W, stride
    (1, 16, 32, 32, 1),
    (3, 24, 7, 57, 2),
    (2, 130, 5, 9, 1),
    (1, 5, 1, 1, 2),
    (2, 300, 8, 6, 2),
    (1, 1, 3, 2, 1),
    (2, 48, 1, 30, 3),
]


def arguments(B, C, H, W, stride):
    torch.manual_seed(0)
    x = torch.randn(B, C, H, W).to(memory_format=torch.channels_last)
    return x, torch.randn(1, C, 3, 3), torch.randn(1), torch.randn(1, C), torch.randn(1), stride


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case):
    args = arguments(*case)
    expected = mask_logits_reference(*(a.double() for a in args[:-1]), args[-1])
    scale = math.sqrt(10 * args[0].shape[1])
    filters = args[1].to(memory_format=torch.channels_last)
    for actual in (OPERATOR(*args), OPERATOR(args[0], filters, *args[2:])):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * scale)


def test_strides_of_single_elements_do_not_matter():
    x, *others = arguments(4, 16, 7, 6, 2)
    unit = MaskUnit(16, stride=2).eval()
    for own in (x[::4], x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]):
        torch.testing.assert_close(OPERATOR(own, *others), OPERATOR(x, *others)[:1])
        with torch.no_grad():
            torch.testing.assert_close(unit(own), unit(x)[:1])


def test_opcheck():
    torch.library.opcheck(OPERATOR.default, arguments(2, 24, 7, 9, 2))


def test_nan_stays_in_its_sample():
    args = arguments(3, 16, 5, 5, 1)
    args[0][1, 3, 2, 2] = math.nan
    out = OPERATOR(*args)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda x: x, True),
        (lambda x: x.contiguous(), False),
        (lambda x: x[:0], False),
        (lambda x: x.double(), False),
        (lambda x: x[:, :, :, 1:], False),
    ],
    ids=["channels_last", "NCHW", "empty", "double", "cut"],
)
@torch.no_grad()
def test_the_mask_unit_uses_it_where_it_serves(calls_of, change, serves):
    calls = calls_of("mask_logits")
    x = change(arguments(2, 16, 7, 6, 2)[0])
    unit = MaskUnit(16, stride=2).to(x.dtype).eval()
    torch.testing.assert_close(unit.logits(x), unit.maskconv(x), rtol=0, atol=1e-5)
    assert bool(calls) == serves
    with torch.enable_grad():
        unit.logits(x)
    with torch.autocast("cpu", torch.bfloat16):
        unit.logits(x)
    assert len(calls) == serves


def test_bad_arguments_are_refused():
    x, conv, *others = arguments(2, 16, 7, 6, 2)
    with pytest.raises(RuntimeError, match="x must be .* channels_last and not empty"):
        OPERATOR(x.contiguous(), conv, *others)
    with pytest.raises(RuntimeError, match=r"conv_weight must be \[1, 16, 3, 3\]"):
        OPERATOR(x, conv[:, :8], *others)
    with pytest.raises(RuntimeError, match="fc_weight must be 16 contiguous float32"):
        OPERATOR(x, conv, others[0], others[1][:, :8].contiguous(), *others[2:])
    with pytest.raises(RuntimeError, match="fc_bias must be 1 contiguous float32"):
        OPERATOR(x, conv, others[0], others[1], others[2].double(), others[3])
