"""DynConv's mask unit as one operator, against its reference."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic.layers import MaskUnit
from timm_dynamic.ops import backend_info
from timm_dynamic.ops.registration import OPERATORS

pytestmark = pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")

OPERATOR = torch.ops.timm_dynamic.mask_logits
DEFINITION = OPERATORS["mask_logits"].definition
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
    expected = DEFINITION(*(a.double() for a in args[:-1]), args[-1])
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
    ("change", "pays"),
    [
        (lambda x: x, True),
        (lambda x: x.contiguous(), False),
        (lambda x: x.double(), False),
        (lambda x: x[:, :, :, 1:], False),
    ],
    ids=["channels_last", "NCHW", "double", "cut"],
)
@torch.no_grad()
def test_the_mask_unit_uses_it_where_it_pays(calls_of, change, pays):
    calls = calls_of("mask_logits")
    x = change(arguments(2, 16, 7, 6, 2)[0])
    unit = MaskUnit(16, stride=2).to(x.dtype).eval()
    assert torch.equal(unit(x), unit.formula(x))
    assert bool(calls) == pays
    with torch.enable_grad():
        unit(x)
    with torch.autocast("cpu", torch.bfloat16):
        unit(x)
    unit.train()(x)
    assert len(calls) == pays
    with timm_dynamic.use(dynconv="sparse"):
        assert torch.equal(unit.eval()(x), unit.formula(x))


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


def test_gradients_and_flops():
    """The operator has those of its definition."""
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments(2, 16, 7, 6, 2)]
    with FlopCounterMode(display=False) as counter:
        out = OPERATOR(*args)
    weights = torch.randn_like(out)
    expected = torch.autograd.grad((DEFINITION(*args) * weights).sum(), args[:-1])
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), args[:-1]), expected)
    assert counter.get_total_flops() == 2 * 16 * (9 * out.numel() + 2)
