"""Memory formats, and which convolutions run packed, by measurement on the example."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timm_dynamic.optimize.packed_conv import FORMATS, PackedConv2d
from timm_dynamic.optimize.report import Report, counted

_ROUNDS = 6
_SECONDS = 2.0  # for measuring ways to run a model, after two rounds that have to be
_LAYER_SECONDS = 0.05
_GAIN = 0.97  # of the time of the first way; what is nearer to it is noise


def choose_format(fast: nn.Module, inputs: tuple, wanted: str | torch.memory_format, report: Report) -> None:
    """Put an optimized model into the memory format that is wanted, or faster, and say so."""
    convs = [module for module in fast.modules() if isinstance(module, PackedConv2d)]
    formats = [name for name, form in FORMATS.items() if wanted in ("auto", form)]
    gains = {name: _convs_that_gain(convs, name) for name in formats} if convs else {}
    ways = dict.fromkeys(formats, ())  # to the convolutions that run packed
    ways |= {f"{name}, packed": gaining for name, gaining in gains.items() if gaining}

    def take(way: str) -> None:
        form = way.removesuffix(", packed")
        if fast._memory_format != form:
            fast._memory_format = form
            fast.to(memory_format=FORMATS[form])
        for conv in convs:
            conv.use(form if conv in ways[way] else None)

    chosen, times = next(iter(ways)), {}
    if len(ways) > 1 and any(isinstance(one, Tensor) and one.dim() == 4 for one in inputs):
        device = next(one.device for one in inputs if isinstance(one, Tensor))
        wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        runs = {way: (functools.partial(take, way), lambda: (fast(*inputs), wait())) for way in ways}
        chosen, times = _fastest(runs, _SECONDS)
    take(chosen)
    for conv in convs:
        conv.forget_unused()
    measured = ", ".join(f"{way} {1e3 * seconds:.2f} ms" for way, seconds in times.items())
    report.append(f"memory format: {chosen}" + (f" (measured: {measured})" if times else ""))
    if ways[chosen]:
        report.append(f"{counted(len(ways[chosen]), 'convolution')} of {len(convs)} with packed weights")


def _convs_that_gain(convs: list[PackedConv2d], form: str) -> set[PackedConv2d]:
    """Those that are faster with packed weights, each measured alone."""
    verdicts: dict[Any, bool] = {}
    gaining = set()
    for conv in convs:
        kind = (*conv.packed_for, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        kind = (*kind, conv.groups, type(conv.act))
        if kind not in verdicts:
            x = torch.zeros(conv.packed_for).contiguous(memory_format=FORMATS[form])
            weight = conv.weight
            conv.weight = nn.Parameter(weight.contiguous(memory_format=FORMATS[form]), requires_grad=False)
            # First the packed one: in a network the plain weight is not in the cache, and all of it is reordered.
            runs = {
                True: (functools.partial(conv.use, form), functools.partial(conv, x)),
                False: (functools.partial(conv.use, None), functools.partial(conv, x)),
            }
            verdicts[kind], _ = _fastest(runs, _LAYER_SECONDS)
            conv.weight = weight
        if verdicts[kind]:
            gaining.add(conv)
    return gaining


def _fastest(
    ways: dict[Any, tuple[Callable[[], object], Callable[[], object]]], seconds: float
) -> tuple[Any, dict[Any, float]]:
    """The way with the shortest time, the first if it is nearly that; and all times.

    Args:
        ways: What makes each ready, and what runs it; measured in turns. One that fails is out: there is code that
            takes maps in one memory format only. But the first has to run.
        seconds: No round begins later than that, but for the first two.
    """
    times = dict.fromkeys(ways, float("inf"))
    first = next(iter(ways))
    start = time.perf_counter()
    for i in range(_ROUNDS):
        for way in list(times):
            prepare, run = ways[way]
            prepare()
            if i == 0:
                try:
                    run()  # to warm up
                except RuntimeError:
                    if way == first:
                        raise
                    del times[way]
                    continue
            before = time.perf_counter()
            run()
            times[way] = min(times[way], time.perf_counter() - before)
        if i > 0 and time.perf_counter() - start > seconds:
            break
    best = min(times, key=times.get)
    return (best if times[best] < _GAIN * times[first] else first), times
