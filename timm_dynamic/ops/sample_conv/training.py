"""What `mixed_conv2d` runs, forwards and backwards: below autograd, so that only what is returned can be kept.

With `pairs[b,(i,k)] = a_in[b,i] * a_tap[b,k]`, the gates of a sample's weight are the products of `a_out[b]` and
`pairs[b]`. The weights are there for some samples at a time, and made again for the backward pass; the CPU kernel of
`channel_fusion` needs a block of one alone. Where positions are rare beside output channels, and there is one kernel,
the input is gated instead: see `columns`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from timm_dynamic.ops.channel_fusion.definition import NO_LIMITS
from timm_dynamic.ops.kernels import has_kernel
from timm_dynamic.ops.precision import no_autocast
from timm_dynamic.ops.sample_conv import columns
from timm_dynamic.ops.sample_conv.samples import convolve, gradients, is_pointwise, multiply
from timm_dynamic.ops.shapes import memory_format, output_size

# Mixed weights that are there at a time. At least four samples are mixed together, as every mixing reads all kernels
# (measured on a CPU, November 2026).
_CHUNK = {"cpu": 2**22, "cuda": 2**27}
# Of these, so many are mixed and gated before the next ones, in the cache: 0.6 of the time of doing each with all. With
# a quarter as many, a backward pass takes 1.15 times as long (od_resnet18_4x at batch 16, AMD EPYC, November 2026).
_CACHED = {"cpu": 2**19, "cuda": 2**27}


def forward(x, attention, kernels, a_in, a_tap, a_out, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the rows of `columns`, or nothing."""
    options = (stride, padding, dilation, groups)
    rows = columns.empty_rows(x, attention, kernels, *options)
    out = None if len(x) else empty_output(x, kernels, stride, padding, dilation)
    with no_autocast(x):
        pairs, a_out = factors(x, attention, kernels, a_in, a_tap, a_out)
        if rows.ndim == 3 and len(x):
            return columns.forward(x, kernels[0], pairs, a_out, rows, stride, padding, dilation), rows
        if is_fused(x, attention, kernels, groups) and (pairs is None or pairs.dtype == x.dtype):
            return fused(x, attention, kernels, pairs, a_out, stride, padding, dilation), rows
        pointwise = is_pointwise(kernels, padding, groups)
        for part, weights in _weights(x, attention, kernels, pairs, a_out):
            weight = weights.to(x.dtype)
            y = multiply(x[part], weight, stride) if pointwise else convolve(x[part], weight, *options)
            if len(y) == len(x):
                return y, rows
            if out is None:  # filled at once, not joined at the end: the samples' memory is used again and again
                out = empty_output(x, kernels, stride, padding, dilation)
            out[part] = y
    return out, rows


def backward(
    grad, x, attention, kernels, a_in, a_tap, a_out, rows, stride, padding, dilation, groups, needs
) -> tuple[Tensor, ...]:
    """The gradients of the six tensors, 0 elements where they are not needed."""
    tensors = (x, attention, kernels, a_in, a_tap, a_out)
    if len(x) == 0:
        return tuple(t.zero_() for t in empty_gradients(*tensors, needs))
    # Room for that of `x` is made only where its parts are to be joined; `columns` makes that of the kernel.
    alone = [False, needs[1], needs[2] and rows.ndim != 3, *needs[3:]]
    grad_x, grad_attention, grad_kernels, *grad_gates = empty_gradients(*tensors, alone)
    options = (stride, padding, dilation, groups)
    with no_autocast(x):
        given = (a_in, a_tap, a_out)
        pairs, a_out = factors(x, attention, kernels, *given)
        if rows.ndim == 3:
            by_columns = (grad, x, kernels[0], pairs, a_out, rows, stride, padding, dilation, needs[0], needs[2])
            dx, dkernel, dpairs, da_out = columns.backward(*by_columns)
            if needs[0]:
                grad_x = dx
            if needs[2]:
                grad_kernels = dkernel[None].contiguous().to(kernels.dtype)
        else:
            dpairs, da_out = (None, None) if pairs is None else (torch.empty_like(pairs), torch.empty_like(a_out))
            dtype = kernels.dtype if pairs is None else pairs.dtype
            dkernels = grad_kernels.zero_() if kernels.dtype == dtype else torch.zeros_like(grad_kernels, dtype=dtype)
            grad = grad.contiguous(memory_format=memory_format(x))
            room, to = None, (grad_attention, dkernels, dpairs, da_out)
            for part, weight in _weights(x, attention, kernels, pairs, a_out):
                if room is None:  # for all parts: the system clears memory that is taken anew
                    room = weight.new_empty(2, min(max(_cached(x.device), weight[:, 0].numel()), weight.numel()))
                dweights = []
                for some, dx, dweight in gradients(grad[part], x[part], weight.to(x.dtype), *options, needs[0]):
                    dweights.append(dweight)
                    if needs[0] and len(dx) == len(x):
                        grad_x = dx.contiguous(memory_format=memory_format(x))
                    elif needs[0]:
                        grad_x = grad_x if grad_x.numel() else torch.empty_like(x, memory_format=memory_format(x))
                        grad_x[part][some] = dx
                _take(dweights, part, attention, kernels, pairs, a_out, room, to)
            if dkernels is not grad_kernels:
                grad_kernels.copy_(dkernels)
        if dpairs is not None:
            _split_pairs(dpairs.unflatten(1, (kernels.shape[2], -1)), da_out, *given[:2], *grad_gates, needs[3:])
    return grad_x, grad_attention, grad_kernels, *grad_gates


def gradient(grad, inputs, outputs, options, needs) -> tuple[Tensor, ...]:
    """For `register`."""
    return torch.ops.timm_dynamic.mixed_conv2d_backward(grad, *inputs, *outputs, *options, needs)


def empty_output(x: Tensor, kernels: Tensor, stride, padding, dilation) -> Tensor:
    """Room for the output."""
    shape = (x.shape[0], kernels.shape[1], *output_size(x.shape[2:], kernels.shape[3:], stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def empty_gradients(x, attention, kernels, a_in, a_tap, a_out, needs) -> tuple[Tensor, ...]:
    """Of the shape of the inputs, contiguous or, that of `x`, in its memory format; 0 elements where not needed."""
    formats = (memory_format(x), *(torch.contiguous_format,) * 5)
    return tuple(
        torch.empty_like(t, memory_format=f) if need else x.new_empty(0)
        for t, f, need in zip((x, attention, kernels, a_in, a_tap, a_out), formats, needs, strict=True)
    )


def factors(x, attention, kernels, a_in, a_tap, a_out) -> tuple[Tensor | None, Tensor | None]:
    """`pairs`, `[B, I * Kh * Kw]`, and `a_out`, in the precision of the weights; None if there is no gate."""
    gates = [gate for gate in (a_in, a_tap, a_out) if gate is not None]
    if not gates and attention is not None:
        return None, None
    dtype = kernels.dtype
    for gate in gates:
        dtype = torch.promote_types(dtype, gate.dtype)
    if a_tap is None and a_in is not None and kernels.shape[3:].numel() == 1 and a_out is not None:
        return a_in.to(dtype).contiguous(), a_out.to(dtype).contiguous()
    sizes = (kernels.shape[2], kernels.shape[3:].numel(), kernels.shape[1])
    a_in, a_tap, a_out = (
        x.new_ones((len(x), n), dtype=dtype) if gate is None else gate.to(dtype)
        for gate, n in zip((a_in, a_tap, a_out), sizes, strict=True)
    )
    return (a_in[:, :, None] * a_tap[:, None]).flatten(1).contiguous(), a_out.contiguous()


def is_fused(x: Tensor, attention: Tensor | None, kernels: Tensor, groups: int) -> bool:
    """Whether the CPU kernel of `channel_fusion` runs it."""
    return (
        groups == 1
        and x.device.type == "cpu"
        and x.dtype == kernels.dtype == torch.float32
        and (attention is None or attention.dtype == torch.float32)
        and x.numel() > 0
        and kernels.is_contiguous()
        and has_kernel("cpu", "channel_fusion")
    )


def fused(x, attention, kernels, pairs, a_out, stride, padding, dilation) -> Tensor:
    """The convolution, without autograd."""
    options, layout = (stride, padding, dilation), memory_format(x)
    if attention is not None:
        attention = attention.contiguous()
    elif is_pointwise(kernels, padding, 1) and layout == torch.contiguous_format:
        x, kernels, options = x[:, :, :: stride[0], :: stride[1]], kernels[0].flatten(1), ()
    x = x.contiguous(memory_format=layout)
    with torch._C._AutoDispatchBelowAutograd():  # whose Python takes as long as a small product
        others = (attention, pairs, a_out, None, None, None, *NO_LIMITS, *options)
        return torch.ops.timm_dynamic.channel_fusion(x, kernels, *others)


def _parts(x: Tensor, attention: Tensor | None, kernels: Tensor) -> Iterator[slice]:
    if attention is None:  # with weights no larger than a sample's map, and never those of all samples
        n = max(1, min((len(x) + 1) // 2, x.shape[1:].numel() // kernels.numel()))
    else:
        n = max(4, _CHUNK.get(x.device.type, _CHUNK["cuda"]) // kernels[0].numel())
    for first in range(0, len(x), n):
        yield slice(first, first + n)


def _weights(x, attention, kernels, pairs, a_out) -> Iterator[tuple[slice, Tensor]]:
    """Of some samples at a time, their weights, `[n, O, I, Kh, Kw]`, in memory that the next ones use again."""
    O, size, matrix, room = kernels.shape[1], kernels.shape[2:].numel(), kernels.flatten(1), None
    dtype = kernels.dtype if pairs is None else pairs.dtype
    for part in _parts(x, attention, kernels):
        n = len(x[part])
        room = kernels.new_empty(n, O, size, dtype=dtype) if room is None else room[:n]
        for outputs, block in _blocks(*room.shape, x.device):
            _mix(attention, part, matrix[:, block], room.flatten(1)[:, block])
            if pairs is not None:
                room[:, outputs].mul_(pairs[part, None]).mul_(a_out[part, outputs, None])
        yield part, room.view(n, *kernels.shape[1:])


def _take(dweights, part: slice, attention, kernels, pairs, a_out, room, to) -> None:
    """Add what follows of the gradients of some samples' gated weights to those that have elements, or are not None.

    Some outputs of all these samples are there at a time, in the cache.

    Args:
        dweights: For some of these samples each.
        part, attention, kernels, pairs, a_out: The samples of the batch, and how their weights are made.
        room: Memory for twice so many outputs.
        to: The gradients of attention, kernels, pairs and outputs' gates.
    """
    grad_attention, grad_kernels, grad_pairs, grad_a_out = to
    n, O, size = sum(map(len, dweights)), kernels.shape[1], kernels.shape[2:].numel()
    matrix = kernels.flatten(1)
    if pairs is not None:
        grad_pairs[part] = 0
    if grad_attention.numel():
        grad_attention[part] = 0
    for outputs, block in _blocks(n, O, size, room.device):
        dweight, products = (one[: n * (block.stop - block.start)].view(n, -1, size) for one in room)
        torch.cat([d[:, outputs].flatten(2) for d in dweights], out=dweight)
        if pairs is not None:
            _mix(attention, part, matrix[:, block], products.flatten(1))
            products.mul_(dweight)
            grad_pairs[part] += torch.bmm(a_out[part, None, outputs], products)[:, 0]
            grad_a_out[part, outputs] = products.mul_(pairs[part, None]).sum(2)  # `bmm` takes five times as long
            dweight.mul_(pairs[part, None]).mul_(a_out[part, outputs, None])
        dweight = dweight.flatten(1)
        if grad_attention.numel():
            grad_attention[part] += torch.mm(dweight, matrix[:, block].t().to(dweight.dtype))
        if grad_kernels.numel() and attention is None:
            grad_kernels.flatten(1)[:, block] += dweight.sum(0, keepdim=True)
        elif grad_kernels.numel():
            grad_kernels.flatten(1)[:, block].addmm_(attention[part].t().to(dweight.dtype), dweight)


def _blocks(n: int, O: int, size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Of weights `[n, O, size]`, some outputs at a time, and their elements of the last dimensions together."""
    step = max(1, _cached(device) // (n * size))
    for first in range(0, O, step):
        last = min(first + step, O)
        yield slice(first, last), slice(first * size, last * size)


def _cached(device: torch.device) -> int:
    return _CACHED.get(device.type, _CACHED["cuda"])


def _mix(attention: Tensor | None, part: slice, matrix: Tensor, out: Tensor) -> None:
    """Some elements of the samples' mixtures of kernels, `[N, elements]`, to `[n, elements]`."""
    if attention is None:
        out.copy_(matrix.expand_as(out))
    else:
        torch.mm(attention[part].to(out.dtype), matrix.to(out.dtype), out=out)


def _split_pairs(dpairs, da_out, a_in, a_tap, grad_a_in, grad_a_tap, grad_a_out, needs) -> None:
    """From the gradients of what `factors` gives to those of the gates that are needed; `dpairs` is `[B, I, taps]`."""
    if needs[0]:
        grad_a_in.copy_((dpairs if a_tap is None else dpairs * a_tap[:, None]).sum(2))
    if needs[1]:
        grad_a_tap.copy_((dpairs if a_in is None else dpairs * a_in[:, :, None]).sum(1))
    if needs[2]:
        grad_a_out.copy_(da_out)
