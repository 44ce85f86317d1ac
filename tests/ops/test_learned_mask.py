"""`learned_mask` by its reference; its kernels are tested on a GPU."""

import pytest
import torch

from timm_dynamic.ops import learned_mask_reference, mask_logits_reference, pack_mask_weights

OPERATOR = torch.ops.timm_dynamic.learned_mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7, 6, 1), (1, 16, 1, 1, 2), (3, 1, 8, 9, 3)], ids=str)
def test_is_where_the_logits_are_not_negative(size, dtype):
    torch.manual_seed(0)
    *shape, stride = size
    x, C = torch.randn(shape), shape[1]
    # Small integers: their sums are exact, and some are 0.
    parameters = [torch.randint(-2, 3, s).to(dtype) for s in ((1, C, 3, 3), (1,), (1, C), (1,))]
    for conv_weight in (parameters[0], parameters[0].contiguous(memory_format=torch.channels_last)):
        weights = pack_mask_weights(conv_weight, *parameters[1:])
        assert weights.shape == (10 * C + 1,) and weights.dtype == torch.promote_types(dtype, torch.float32)
        exact = x.round().to(dtype)
        mask = learned_mask_reference(exact, weights, stride)
        logits = mask_logits_reference(exact.double(), *(p.double() for p in parameters), stride)
        decided = logits.abs() > 1e-4  # the mean is rounded
        assert mask.dtype == dtype and torch.equal((mask == 1)[decided], (logits >= 0)[decided])
        assert ((mask == 0) | (mask == 1)).all()
        assert torch.equal(OPERATOR(exact, weights, stride), mask)


def test_opcheck():
    torch.library.opcheck(OPERATOR.default, (torch.randn(2, 3, 5, 4), torch.randn(31), 2))
