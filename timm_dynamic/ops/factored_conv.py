"""Convolution with a weight per sample that is a shared one times gates for its outputs, inputs and taps:

    out[b,o] = sum_r a_out[b,o,r] * sum_{i,k} weight[o,i,k] * a_in[b,i,r] * a_tap[b,k,r] * x[b,i] shifted by tap k

(Hou and Kung, PEDConv, BMVC 2021). The `[B, Co, Ci, K, K]` weights that this means are never all there. Whichever has
fewer elements is scaled: the shared weight, for one sample at a time, or the taps of every output position ("columns"),
a few samples at a time, which then meet the shared weight in one matrix product. On a GPU the kernels of `fused_conv`
need neither in memory, where these serve.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_dynamic.ops import fused_conv
from timm_dynamic.ops._autocast import autocast_dtype, no_autocast
from timm_dynamic.ops._library import NAMESPACE, inference_kernel_serves
from timm_dynamic.ops._linear import linear
from timm_dynamic.ops.per_sample_conv import Pair, columns_of, memory_format, output_size, tap_views

_CHUNK = 2**21  # elements of the columns that are there at a time


def factored_conv2d(
    x: Tensor,
    weight: Tensor,
    a_in: Tensor,
    a_tap: Tensor,
    a_out: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve every sample with the shared weight times its own gates.

    In training only the arguments are kept for the backward pass, and, where columns are scaled (see `_empty_rows`),
    the output before `a_out`. Gates and weight are multiplied in the
    higher one of their precisions and cast to that of `x` afterwards. Under autocast `x` is cast.

    Args:
        x: `[B, C, H, W]`; the output has its dtype and memory format.
        weight: `[Co, C // groups, Kh, Kw]`.
        a_in: `[B, C // groups, R]`, the same for every group.
        a_tap: `[B, Kh * Kw, R]`.
        a_out: `[B, Co, R]`.
        stride, padding, dilation, groups: As for `conv2d`; the padding is of zeros.

    Returns:
        `[B, Co, Ho, Wo]`.

    Raises:
        ValueError: If the shapes do not fit together or the input is smaller than the kernel.
    """
    x = x.to(autocast_dtype(x))
    _check(x, weight, a_in, a_tap, a_out, stride, padding, dilation, groups)
    dtype = torch.promote_types(weight.dtype, a_in.dtype)
    gates = (a.to(dtype) for a in (a_in, a_tap, a_out))
    arguments = (x, weight, *gates, stride, padding, dilation, groups)
    if torch.onnx.is_in_onnx_export():
        return factored_conv2d_reference(*arguments)
    if inference_kernel_serves(x, weight):  # at batch 1 the time goes into calls
        return _forward(*arguments)[0]
    return torch.ops.timm_dynamic.factored_conv2d(*arguments)[0]


def factored_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    a_in: Tensor,
    a_tap: Tensor,
    a_out: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The same as `factored_conv2d` in plain differentiable PyTorch: a 1x1 convolution of scaled columns."""
    columns = columns_of(x, tuple(weight.shape[2:]), stride, padding, dilation)
    matrix = weight.to(x.dtype).flatten(1)[:, :, None, None]
    out = 0
    for r in range(a_in.shape[2]):
        scale = (a_in[:, :, None, r] * a_tap[:, None, :, r]).to(x.dtype).flatten(1)
        scaled = columns * scale.repeat(1, groups)[:, :, None, None]
        out = out + F.conv2d(scaled, matrix, groups=groups) * a_out[:, :, r, None, None].to(x.dtype)
    return out


def _check(x, weight, a_in, a_tap, a_out, stride, padding, dilation, groups) -> None:
    Co, Ci, Kh, Kw = weight.shape
    if x.ndim != 4 or x.shape[1] != Ci * groups:
        raise ValueError(f"x must be [B, {Ci * groups}, H, W], got shape {list(x.shape)}")
    if min(output_size(x.shape[2:], (Kh, Kw), stride, padding, dilation)) < 1:
        raise ValueError(
            f"x of size {list(x.shape[2:])} is too small for a {Kh}x{Kw} kernel with padding {padding} and "
            f"dilation {dilation}"
        )
    for name, gate, n in (("a_in", a_in, Ci), ("a_tap", a_tap, Kh * Kw), ("a_out", a_out, Co)):
        if gate.shape != (x.shape[0], n, a_in.shape[-1]):
            raise ValueError(f"{name} must be [{x.shape[0]}, {n}, R], got shape {list(gate.shape)}")


# What the operator runs: below autograd, so that only what is returned can be kept.
#
# With `pairs[b,r,(i,k)] = a_in[b,i,r] * a_tap[b,k,r]` the gates of a sample's weight are `a_out[b] @ pairs[b]`.


def _forward(x, weight, a_in, a_tap, a_out, stride, padding, dilation, groups):
    options = (stride, padding, dilation)
    rows = _empty_rows(x, weight, a_in, *options, groups)
    if len(x) >= fused_conv.LEAST_BATCH and _fused_serves(x, weight, a_in, *options, groups):
        return fused_conv.gated(x, weight, a_in, a_tap, a_out, *options), rows
    with no_autocast(x):
        pairs = _pairs(a_in, a_tap)
        if rows.ndim == 3 and (len(x) > 1 or _weight_order(rows)):
            matrix = _matrix(weight, rows).to(x.dtype)
            for chunk, columns in _columns(x, weight, pairs, rows, *options):
                rows[chunk] = linear(columns, matrix).view(rows[chunk].shape)
            out = _empty_output(x, weight, *options)
            torch.mul(rows.mT.view(out.shape), a_out[..., None].to(x.dtype), out=out)
        elif len(x) == 1 and a_in.shape[2] == 1:
            own = (weight * pairs.view(weight.shape[1:])).to(x.dtype)
            out = F.conv2d(x, own, None, *options, groups)
            if rows.ndim == 3:
                rows = out.flatten(2).mT.clone(memory_format=torch.contiguous_format)
            out = out.mul_(a_out[..., None].to(x.dtype)).contiguous(memory_format=memory_format(x))
        else:
            out = _empty_output(x, weight, *options)
            for b in range(len(x)):
                own = (weight * torch.matmul(a_out[b], pairs[b]).view(weight.shape)).to(x.dtype)
                out[b] = F.conv2d(x[b : b + 1], own, None, *options, groups)[0]
    return out, rows


def _backward(grad, x, weight, a_in, a_tap, a_out, rows, stride, padding, dilation, groups, needs):
    if len(x) >= fused_conv.LEAST_BATCH and _fused_serves(x, weight, a_in, stride, padding, dilation, groups):
        return _backward_fused(grad, x, weight, a_in, a_tap, a_out, stride, padding, dilation, needs)
    by = _backward_by_columns if rows.ndim == 3 else _backward_by_sample
    with no_autocast(x):
        pairs = _pairs(a_in, a_tap)
        options = (stride, padding, dilation, groups)
        grad_x, grad_weight, grad_pairs, grad_a_out = by(grad, x, weight, pairs, a_out, rows, *options, needs)
        grad_pairs = grad_pairs.view(*pairs.shape[:2], a_in.shape[1], a_tap.shape[1])
        grad_a_in = (grad_pairs * a_tap.mT[:, :, None]).sum(3).mT.contiguous()
        grad_a_tap = (grad_pairs * a_in.mT[..., None]).sum(2).mT.contiguous()
    return grad_x, grad_weight, grad_a_in, grad_a_tap, grad_a_out


def _backward_fused(grad, x, weight, a_in, a_tap, a_out, stride, padding, dilation, needs):
    grad = grad.contiguous(memory_format=torch.channels_last)
    tensors, options = (grad, x, weight, a_in, a_tap, a_out), (stride, padding, dilation)
    grad_x, grad_weight, grad_pairs, grad_a_out = fused_conv.gated_backward(*tensors, *options, need_x=needs[0])
    with no_autocast(x):
        return (
            grad_x if needs[0] else x.new_empty(0),
            grad_weight if needs[1] else weight.new_empty(0),
            (grad_pairs * a_tap).sum(1)[..., None],
            (grad_pairs * a_in.mT).sum(2)[..., None],
            grad_a_out,
        )


def _fused_serves(
    x: Tensor, weight: Tensor, a_in: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> bool:
    return a_in.shape[2] == 1 and fused_conv.serves(x, weight, stride, padding, dilation, groups)


def _backward_by_sample(grad, x, weight, pairs, a_out, rows, stride, padding, dilation, groups, needs):
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=pairs.dtype) if needs[1] else weight.new_empty(0)
    grad_pairs, grad_a_out = torch.empty_like(pairs), torch.empty_like(a_out)
    for b in range(len(x)):
        gates = torch.matmul(a_out[b], pairs[b])
        own = (weight * gates.view(weight.shape)).to(x.dtype)
        grad_own_x, grad_own, _ = torch.ops.aten.convolution_backward(
            *(grad[b : b + 1], x[b : b + 1], own, None, stride, padding, dilation, False, (0, 0), groups),
            (needs[0], True, False),
        )
        if needs[0]:
            grad_x[b] = grad_own_x[0]
        grad_own = grad_own.to(pairs.dtype)
        if needs[1]:
            grad_weight.addcmul_(grad_own, gates.view(weight.shape))
        grad_gates = (grad_own * weight).flatten(1)
        grad_a_out[b] = torch.matmul(grad_gates, pairs[b].t())
        grad_pairs[b] = torch.matmul(a_out[b].t(), grad_gates)
    return grad_x, grad_weight.to(weight.dtype), grad_pairs, grad_a_out


def _backward_by_columns(grad, x, weight, pairs, a_out, rows, stride, padding, dilation, groups, needs):
    kernel_size = weight.shape[2:]
    grad_rows = grad.flatten(2).mT.contiguous()
    grad_a_out = (grad_rows * rows).sum(1, dtype=a_out.dtype)[..., None]
    grad_rows = grad_rows * a_out.mT.to(x.dtype)

    matrix, scale = _matrix(weight, rows).to(x.dtype), _scale(weight, pairs, x.dtype)
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_matrix = torch.zeros_like(matrix, dtype=pairs.dtype)
    grad_scale = torch.empty_like(scale, dtype=pairs.dtype)
    for chunk, columns in _columns(x, weight, pairs, rows, stride, padding, dilation):
        grad_chunk = grad_rows[chunk].flatten(0, 1)
        if needs[1]:
            grad_matrix += linear(grad_chunk.t(), columns.t())
        padded = _padded(x[chunk], padding)
        grad_padded = torch.zeros_like(padded)
        grad_columns = _by_tap(linear(grad_chunk, matrix.t()).view(len(padded), *grad.shape[2:], -1), weight, rows)
        views = (tap_views(t, kernel_size, stride, dilation) for t in (padded, grad_padded))
        for k, (tap, grad_tap) in enumerate(zip(*views, strict=True)):
            grad_scale[chunk, k] = (grad_columns[k] * tap).sum((2, 3), dtype=pairs.dtype)
            if needs[0]:
                grad_tap.addcmul_(grad_columns[k], scale[chunk, k, :, None, None])
        if needs[0]:
            grad_x[chunk] = F.pad(grad_padded, [-p for p in (padding[1], padding[1], padding[0], padding[0])])
    if needs[1]:
        grad_weight = torch.empty_like(weight).copy_(
            _by_tap(grad_matrix, weight, rows).movedim(0, -1).view(weight.shape)
        )
    else:
        grad_weight = weight.new_empty(0)
    return grad_x, grad_weight, grad_scale.mT.reshape(pairs.shape), grad_a_out


def _columns(
    x: Tensor, weight: Tensor, pairs: Tensor, rows: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[tuple[slice, Tensor]]:
    """Scaled taps, `[n * Ho * Wo, C * Kh * Kw]`, of some samples at a time, in a buffer which the next ones reuse."""
    C, Kh, Kw = weight.shape[1:]
    scale = _scale(weight, pairs, x.dtype)
    Ho, Wo = output_size(x.shape[2:], (Kh, Kw), stride, padding, dilation)
    limit = _CHUNK if x.device.type == "cpu" else max(_CHUNK, x.numel())
    n = max(1, limit // (Ho * Wo * Kh * Kw * C))
    buffer = x.new_empty(min(n, len(x)), Ho, Wo, Kh * Kw * C)
    for first in range(0, len(x), n):
        chunk = slice(first, min(first + n, len(x)))
        columns = buffer[: chunk.stop - first]
        by_tap = _by_tap(columns, weight, rows)
        for k, tap in enumerate(tap_views(_padded(x[chunk], padding), (Kh, Kw), stride, dilation)):
            torch.mul(tap, scale[chunk, k, :, None, None], out=by_tap[k])
        yield chunk, columns.flatten(0, 2)


def _empty_output(x: Tensor, weight: Tensor, *options: Pair) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *output_size(x.shape[2:], weight.shape[2:], *options))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _empty_rows(
    x: Tensor, weight: Tensor, a_in: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Room for the output before `a_out`, `[B, Ho * Wo, Co]`, if columns are to be scaled; else an empty tensor.

    They are where they have fewer elements than the weight of every sample. On a GPU they are wherever possible, as a
    kernel launch per sample takes longer, except where fused kernels serve.
    """
    if _fused_serves(x, weight, a_in, stride, padding, dilation, groups):
        return x.new_empty(0)
    Ho, Wo = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    by_columns = groups == 1 and a_in.shape[2] == 1 and (Ho * Wo < weight.shape[0] or x.device.type == "cuda")
    return x.new_empty((x.shape[0], Ho * Wo, weight.shape[0]) if by_columns else 0)


# Where the positions of the whole batch are few beside the output channels, the columns are put in the order of the
# weight, (channel, tap); elsewhere a copy of the weight in an order in which the columns are made fast, (tap, channel).


def _weight_order(rows: Tensor) -> bool:
    B, positions, Co = rows.shape
    return 4 * B * positions <= Co


def _matrix(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.flatten(1) if _weight_order(rows) else weight.flatten(2).mT.flatten(1)


def _by_tap(columns: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """View `[n, Ho, Wo, C * Kh * Kw]` as `[Kh * Kw, n, C, Ho, Wo]`, `[Co, C * Kh * Kw]` as `[Kh * Kw, Co, C]`."""
    C, taps = weight.shape[1], weight.shape[2:].numel()
    if _weight_order(rows):
        columns = columns.unflatten(-1, (C, taps)).movedim(-1, 0)
    else:
        columns = columns.unflatten(-1, (taps, C)).movedim(-2, 0)
    return columns.movedim(-1, 2)


def _pairs(a_in: Tensor, a_tap: Tensor) -> Tensor:
    return (a_in.mT[..., None] * a_tap.mT[:, :, None]).flatten(2)


def _scale(weight: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Kh * Kw, C]`: what the columns are scaled by, for rank 1."""
    return pairs.view(len(pairs), *weight.shape[1:]).flatten(2).mT.to(dtype, memory_format=torch.contiguous_format)


def _padded(x: Tensor, padding: Pair) -> Tensor:
    """Zero-padded, with the channels innermost in memory."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return x.contiguous(memory_format=torch.channels_last)


# Registration: the schema, and what torch.compile and autograd need to know.

_GATES = "Tensor a_in, Tensor a_tap, Tensor a_out"
_ARGS = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    f"{NAMESPACE}::factored_conv2d", f"(Tensor x, Tensor weight, {_GATES}, {_ARGS}) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    f"{NAMESPACE}::factored_conv2d_backward",
    f"(Tensor grad, Tensor x, Tensor weight, {_GATES}, Tensor rows, {_ARGS}, bool[2] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl(f"{NAMESPACE}::factored_conv2d", "CompositeExplicitAutograd")(_forward)
torch.library.impl(f"{NAMESPACE}::factored_conv2d_backward", "CompositeExplicitAutograd")(_backward)


@torch.library.register_fake(f"{NAMESPACE}::factored_conv2d")
def _forward_fake(x, weight, a_in, a_tap, a_out, stride, padding, dilation, groups):
    options = (stride, padding, dilation)
    return _empty_output(x, weight, *options), _empty_rows(x, weight, a_in, *options, groups)


@torch.library.register_fake(f"{NAMESPACE}::factored_conv2d_backward")
def _backward_fake(grad, x, weight, a_in, a_tap, a_out, rows, stride, padding, dilation, groups, needs):
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if needs[1] else weight.new_empty(0)
    return (
        grad_x,
        grad_weight,
        *(torch.empty_like(a, memory_format=torch.contiguous_format) for a in (a_in, a_tap, a_out)),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    *inputs, rows = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():  # create_graph: the reference can be differentiated again
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        out = factored_conv2d_reference(*inputs, *ctx.options)
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(grads) if need else None for need in needs), None, None, None, None
    grads = torch.ops.timm_dynamic.factored_conv2d_backward(grad, *inputs, rows, *ctx.options, list(needs[:2]))
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::factored_conv2d", _autograd, setup_context=_setup_context)
