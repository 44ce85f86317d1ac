"""Small DynConv networks for the tests."""

import pytest
import timm
import torch
from shallow import shallow
from torch import nn

from timm_dynamic import optimize
from timm_dynamic.layers.progress import Progress
from timm_dynamic.models._mobilenetv2 import _STAGES

# Small networks of every kind of block: model, its arguments, size of its images.
SMALL = {
    "basic": ("dynconv_resnet8", {}, 32),
    "bottleneck": ("dynconv_resnet50", {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 24), "num_classes": 10}, 64),
    "inverted": ("dynconv_mobilenetv2_050", {"num_classes": 10}, 64),
}
every_kind = pytest.mark.parametrize("kind", SMALL)


def image(kind="basic", batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, SMALL[kind][2], SMALL[kind][2], dtype=dtype)


def create(kind="basic", **kwargs):
    """As timm makes it, in float64."""
    name, options, _ = SMALL[kind]
    blocks = shallow(_STAGES, 2) if kind == "inverted" else {}  # the second of a stage has a mask
    return timm.create_model(name, **{**options, **blocks, **kwargs}).double()


def build(kind="basic", **kwargs):
    """In eval mode, its norms not as new."""
    model = create(kind, **kwargs)
    with torch.no_grad():
        for _ in range(3):
            model(image(kind, 4))
    for module in model.modules():
        if isinstance(module, Progress) and module.counts:
            module.done.zero_()
    return model.eval()


@torch.no_grad()
def run(model, x, execution):
    model.execution = execution
    return model(x)


@torch.no_grad()
def dense(model, x):
    """The output with every position computed; the model's execution stays."""
    before, model.execution = model.execution, "dense"
    y = model(x)
    model.execution = before
    return y


class PatternMask(nn.Module):
    """Instead of a mask unit: active where a fixed pattern is below `share[0]`, which a test changes."""

    def __init__(self, stride, share):
        super().__init__()
        self.stride, self.share, self.patterns = stride, share, {}

    def __deepcopy__(self, memo):
        return PatternMask(self.stride, self.share)

    def forward(self, x):
        shape = (len(x), 1, *(-(-n // self.stride) for n in x.shape[2:]))
        if (shape, x.device) not in self.patterns:
            pattern = torch.rand(shape, generator=torch.Generator().manual_seed(3))
            self.patterns[shape, x.device] = pattern.to(x.device)
        return (self.patterns[shape, x.device] < self.share[0]).to(x.dtype)


def plain_with_share(kind, share, **kwargs):
    """With `PatternMask`s and sparse execution."""
    model = build(kind, **kwargs)
    for block in model.masked_blocks():
        block.masker = PatternMask(block.masker.stride, share)
    model.execution = "sparse"
    return model.eval()


def build_with_share(kind, share, **kwargs):
    """Optimized, too."""
    return optimize(plain_with_share(kind, share, **kwargs), image(kind, 1), memory_format=torch.channels_last)


def assert_same_in_all_executions(model, x, **close):
    before, expected = x.clone(), run(model, x, "dense")
    for execution in ("sparse", "auto"):
        torch.testing.assert_close(run(model, x, execution), expected, **close)
    assert torch.equal(x, before)
    return expected
