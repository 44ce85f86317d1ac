"""Convolutions and dynamic layers take over the norm, and the activation, that run behind them."""

import copy
from collections.abc import Iterable

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from timm_dynamic.dispatch import has_hooks
from timm_dynamic.layers.base import has_plain_forward
from timm_dynamic.ops.norms import affine
from timm_dynamic.optimize.packed_conv import FUSED, PackedConv2d
from timm_dynamic.optimize.report import Report, counted
from timm_dynamic.optimize.trace import Trace

# Exact types: what a subclass does is not known.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, PackedConv2d)
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNormAct2d,
    SyncBatchNormAct,
    FrozenBatchNormAct2d,
    FrozenBatchNorm2d,
)
# The activations that are clamps, by exact type.
_CLAMPS = {
    nn.ReLU: lambda act: (0.0, torch.inf),
    nn.ReLU6: lambda act: (0.0, 6.0),
    nn.Hardtanh: lambda act: (float(act.min_val), float(act.max_val)),
}


class Folding:
    """Changes a model in place, by what one forward of it has shown.

    Args:
        model: The inference copy.
        trace: Of it.
        opaque: Modules within which nothing is changed.
    """

    def __init__(self, model: nn.Module, trace: Trace, opaque: Iterable[nn.Module]):
        self._model, self._trace = model, trace
        self._hidden = {part for module in opaque for part in module.modules() if part is not module}
        self._names = {module: name for name, module in model.named_modules()}

    def run(self, report: Report) -> None:
        """Fold, and say so."""
        left, norms, layers, activations = {}, 0, 0, 0
        for producer in [module for module in self._names if module not in self._hidden]:
            dynamic = _is_dynamic(producer)
            if not dynamic and type(producer) not in _CONVOLUTIONS:
                continue
            if type(producer) is nn.Conv2d and self._can_be_packed(producer):
                PackedConv2d.convert(producer, self._trace.input_sizes[producer])
            norm = self._trace.only_reader(producer)
            if norm is not None and type(norm) in _NORMS and self._why_left(norm) is None:
                try:
                    absorbed = _absorb(producer, norm)
                except ValueError as error:
                    left[self._names[norm]] = str(error)
                    continue
                self._replace(producer, absorbed)
                act = getattr(norm, "act", None) or nn.Identity()
                self._replace(norm, act)
                norms, layers = norms + (not dynamic), layers + dynamic
                if type(act) is nn.Identity:
                    act = self._trace.only_reader(norm)
                producer = absorbed
            else:
                act = norm
            if act is not None and act in self._names and self._fits(producer, act):
                self._replace(act, nn.Identity())
                if isinstance(producer, PackedConv2d):
                    producer.act = act
                else:
                    producer.limits = _CLAMPS[type(act)](act)
                activations += 1
        for norm, name in self._names.items():
            if norm not in self._hidden and _is_norm(norm) and self._still_there(norm) and name not in left:
                left[name] = self._why_left(norm) or "what runs before it is no convolution that could take it over"
        if norms:
            report.append(f"{counted(norms, 'convolution')} took over the norm behind")
        if layers:
            report.append(f"{counted(layers, 'dynamic layer')} took over the norm behind")
        if activations:
            report.append(f"{counted(activations, 'activation')} went into what is before")
        report.add_left(left)

    def _can_be_packed(self, conv: nn.Conv2d) -> bool:
        return (
            conv.weight.device.type == "cpu"
            and conv.weight.dtype == torch.float32
            and isinstance(conv.padding, tuple)
            and conv.padding_mode == "zeros"
            and _is_plain(conv)
            and conv in self._trace.input_sizes
            and torch.backends.mkldnn.is_available()
        )

    def _why_left(self, norm: nn.Module) -> str | None:
        """Why a norm stays; None: it can go into what is before."""
        trace, source = self._trace, self._trace.sources.get(norm)
        if not trace.calls[norm]:
            return "it did not run"
        if type(norm) not in _NORMS or "forward" in vars(norm):
            return f"nothing is known about a {type(norm).__name__} that would let it be folded"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        if source is None or not (_is_dynamic(source) or isinstance(source, nn.modules.conv._ConvNd)):
            return "it is not behind a convolution"
        if not _is_dynamic(source) and type(source) not in _CONVOLUTIONS:
            return f"the convolution before it is a {type(source).__name__}"
        name = self._names[source] or "the model itself"
        for module, words in ((norm, "it"), (source, name)):
            if has_hooks(module):
                return f"there are hooks on {words}"
            if "forward" in vars(module):
                return f"{words} has a forward of its instance"
            if trace.calls[module] > 1:
                return f"{words} runs {trace.calls[module]} times"
            if module in trace.read_elsewhere:
                return f"something else reads the weights of {words}"
        readers = [one for one in trace.readers(source) if one is not norm]
        if readers:
            reader = "something else" if readers[0] is None else self._names[readers[0]] or "the model itself"
            return f"{reader} also reads the output of {name}"
        if isinstance(getattr(norm, "drop", None), nn.Module) and type(norm.drop) is not nn.Identity:
            return f"there is a {type(norm.drop).__name__} within it"
        return None

    def _fits(self, producer: nn.Module, act: nn.Module) -> bool:
        """Whether an activation can go into what runs before it."""
        calls = self._trace.calls  # a layer that has taken over a norm is a new one, of which there are none
        if calls[act] != 1 or calls.get(producer, 1) != 1 or not _is_plain(act) or not _is_plain(producer):
            return False
        if isinstance(producer, PackedConv2d):
            return type(act) in FUSED and type(producer.act) is nn.Identity
        return type(act) in _CLAMPS and getattr(producer, "limits", ()) is None and has_plain_forward(producer)

    def _still_there(self, module: nn.Module) -> bool:
        return any(one is module for one in self._model.modules())

    def _replace(self, module: nn.Module, other: nn.Module) -> None:
        """Wherever it is in the model."""
        if module is not other:
            for parent in list(self._model.modules()):
                for name, child in parent._modules.items():
                    if child is module:
                        parent._modules[name] = other


def _is_dynamic(module: nn.Module) -> bool:
    return callable(getattr(module, "absorb", None))


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "running_var") or isinstance(module, nn.modules.batchnorm._NormBase)


def _is_plain(module: nn.Module) -> bool:
    """Whether it runs its type's forward and nothing besides."""
    return not has_hooks(module) and "forward" not in vars(module)


def _absorb(producer: nn.Module, norm: nn.Module) -> nn.Module:
    """What gives the output of both."""
    scale, shift = affine(copy.deepcopy(norm).double())
    if _is_dynamic(producer):
        like = next((one for one in producer.parameters() if one.is_floating_point()), scale)
        return producer.absorb(scale.to(like.dtype), shift.to(like.dtype)).eval().requires_grad_(False)
    weight = producer.weight.double() * scale.view(-1, *[1] * (producer.weight.dim() - 1))
    bias = shift if producer.bias is None else producer.bias.double() * scale + shift
    weight, bias = weight.to(producer.weight.dtype), bias.to(producer.weight.dtype)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"the folded weights are not finite in {weight.dtype}")
    producer.weight, producer.bias = (nn.Parameter(one, requires_grad=False) for one in (weight, bias))
    return producer
