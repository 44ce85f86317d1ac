"""How a block with a mask skips what the mask leaves out, and a mask unit runs by its kernel."""

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from timm_dynamic.ops.implementation import Implementation
from timm_dynamic.ops.kernels import choice
from timm_dynamic.ops.norms import affine
from timm_dynamic.ops.precision import autocast_dtype
from timm_dynamic.ops.sparse.definition import NO_LIMITS, runs_kernel
from timm_dynamic.ops.sparse.executor import Geometry, Plan, execute, fold, make_tables, pointwise
from timm_dynamic.ops.sparse.mask_logits import has_mask_kernel, mask_logits

NAME = "sparse"
# The activations that are clamps.
LIMITS = {type(None): NO_LIMITS, nn.Identity: NO_LIMITS, nn.ReLU: (0.0, torch.inf), nn.ReLU6: (0.0, 6.0)}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST_ACTIVE = 0.25  # without kernels of the CPU
# Folding and packing weights for one call, 2.6 ms for a million of them, takes as long as computing so many positions
# (every block of dynconv_resnet50 at batch 1 and 4, of dynconv_mobilenetv2 at batch 1, one thread of a CPU).
_FOLDED_POSITIONS = 120


def same_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding with which only strides make a map smaller."""
    return tuple(d * (k // 2) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))


def activation(norm: nn.Module | None, act: nn.Module | None) -> nn.Module | None:
    """What follows a norm: timm's may have an activation within."""
    return norm.act if isinstance(norm, BatchNormAct2d) else act


def step_problem(conv: nn.Module | None, norm: nn.Module | None, act: nn.Module | None) -> str | None:
    """Why a convolution, its norm in eval mode and its activation cannot be folded, in words, or None."""
    if type(conv) is not nn.Conv2d:
        return f"a convolution is a {type(conv).__name__}"
    if conv.padding_mode != "zeros" or conv.groups not in (1, conv.in_channels):
        return f"a convolution has {conv.groups} groups and padding mode {conv.padding_mode!r}"
    if norm is not None:
        if type(norm) not in _NORMS:
            return f"a norm is a {type(norm).__name__}"
        if norm.training or norm.running_mean is None:
            return "a norm does not use its running statistics"
    act = activation(norm, act)
    return None if type(act) in LIMITS else f"an activation is a {type(act).__name__}"


def branch_problem(layer) -> str | None:
    """Why the executor cannot run the branch of a block, in words, or None."""
    for step in layer.steps():
        problem = step_problem(*step)
        if problem is not None:
            return problem
    final = layer.final_activation()
    return None if type(final) in LIMITS else f"the activation of the sum is a {type(final).__name__}"


def make_plan(layer, dtype: torch.dtype) -> Plan:
    """Fold and pack the weights of a block, of which `branch_problem` is None.

    Args:
        layer: A `SparseBranch`.
        dtype: Of the maps.
    """
    convs = []
    for conv, norm, act in layer.steps():
        scale, shift = (None, torch.zeros_like(conv.weight[:, 0, 0, 0])) if norm is None else affine(norm)
        if conv.bias is not None:
            shift = shift + (conv.bias if scale is None else conv.bias * scale)
        convs.append(fold(conv.weight, scale, shift, conv.groups, LIMITS[type(activation(norm, act))], dtype))
    limits = LIMITS[type(layer.final_activation())]
    return Plan(_geometry(layer), tuple(convs), limits, _folded_shortcut(layer, dtype))


def _geometry(layer) -> Geometry:
    (first, *_), (second, *_), *_ = layer.steps()
    windows = [(conv.kernel_size, conv.stride, conv.dilation, same_padding(conv)) for conv in (first, second)]
    is_pointwise = (first.kernel_size, first.stride) == ((1, 1), (1, 1))
    return Geometry(None if is_pointwise else windows[0], windows[1], first.out_channels, second.groups > 1)


def _folded_shortcut(layer, dtype: torch.dtype):
    """Its convolution, if that comes last and is 1x1: so it does where a norm has been folded into it."""
    last = layer.downsample[-1] if type(layer.downsample) is nn.Sequential and len(layer.downsample) else None
    if type(last) is not nn.Conv2d or last.groups != 1 or last.kernel_size != (1, 1) or last.bias is None:
        return None
    return fold(last.weight, None, last.bias, 1, NO_LIMITS, dtype), last.stride


def _cannot(layer, x: Tensor) -> str | None:
    if layer.execution == "dense":
        return "its execution is 'dense'"
    if layer.training:
        return "the layer is in training mode"
    if x.ndim != 4 or x.numel() == 0:
        return "the input is empty or has no batch"
    return None if layer.packed else branch_problem(layer)


def _pays(layer, x: Tensor) -> str | None:
    if layer.packed or layer.max_active is not None:
        return None
    stride = layer.masker.stride
    positions = len(x) * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    if positions > _FOLDED_POSITIONS:
        return None
    return f"packing the weights for {positions} positions takes longer than skipping most of them saves"


def _most_active(layer, mask: Tensor, dtype: torch.dtype) -> float:
    """The share of active positions up to which this is the faster way."""
    if NAME in (layer.execution, choice(layer.family)):
        return 1.0
    if layer.max_active is not None:
        return layer.max_active
    if mask.device.type != "cpu" or dtype != torch.float32 or not runs_kernel("gather_conv", mask):
        return _MOST_ACTIVE
    return 1.0 if layer.packed else 1 - _FOLDED_POSITIONS / mask.numel()


def run(layer, x: Tensor, overwrite: bool = False) -> Tensor:
    """A block by the executor, or by `layer.dense` if too many positions are active.

    Args:
        layer: A `SparseBranch`.
        x: Its input.
        overwrite: The output may take the place of x, which is the output of a block with the same final activation.
    """
    mask, dtype = layer.mask(x), autocast_dtype(x)
    plan = layer.plan(dtype)
    geometry = _geometry(layer) if plan is None else plan.geometry
    tables = make_tables(geometry, x, mask, _most_active(layer, mask, dtype), layer.seen)
    if tables is None:
        return layer.dense(x, mask).to(dtype)
    plan = make_plan(layer, dtype) if plan is None else plan
    x = x.contiguous(memory_format=torch.channels_last)
    in_place = overwrite and layer.downsample is None and x.dtype == dtype
    out = x if in_place else _shortcut(layer, plan, x, dtype)
    execute(plan, x, mask, out, tables)
    return out if in_place or plan.limits[0] == -torch.inf else out.clamp_(*plan.limits)


def _shortcut(layer, plan: Plan, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the shortcut gives, in channels_last and memory that is nobody else's."""
    if layer.downsample is None:
        return x.to(dtype, copy=True)
    if plan.shortcut is None:
        y = layer.downsample(x)
        shared = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        y = y.to(dtype, copy=shared)
        return y.contiguous(memory_format=torch.channels_last)
    folded, (sy, sx) = plan.shortcut
    for module in layer.downsample[:-1]:
        x = module(x)
    return pointwise(x[:, :, ::sy, ::sx], folded)


def _cannot_mask(unit, x: Tensor) -> str | None:
    if unit.training:
        return "the unit is in training mode"
    return "the input is empty" if x.numel() == 0 else None


def _mask_pays(unit, x: Tensor) -> str | None:
    if unit.kernel_size == 1:
        on_cpu = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
        return None if on_cpu else "the product is for channels_last, on a CPU"
    return None if has_mask_kernel(x) else "the kernel is for channels_last in float32, on a CPU where it is loaded"


def _run_mask(unit, x: Tensor) -> Tensor:
    if unit.kernel_size == 1:
        conv, s = unit.maskconv, unit.stride
        rows = x[:, :, ::s, ::s].permute(0, 2, 3, 1)
        logits = F.linear(rows, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    else:
        conv, fc = unit.maskconv.conv, unit.maskconv.fc
        logits = mask_logits(x, conv.weight, conv.bias, fc.weight, fc.bias, unit.stride)
    return (logits >= 0).to(x.dtype)


# Skips most of the work: benchmarks/sparse.py.
BLOCK = (Implementation(NAME, run, ("cpu", "cuda"), _DTYPES, autocast=True, cannot=_cannot, pays=_pays),)
# A convolution to one channel costs libraries as much as one to sixteen (dynconv_resnet50, on a CPU), a 1x1 one twice
# as much as the product (dynconv_hourglass at batch 1, two threads).
MASK = (Implementation(NAME, _run_mask, ("cpu", "cuda"), _DTYPES, cannot=_cannot_mask, pays=_mask_pays),)
