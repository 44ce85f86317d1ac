"""Inference without batch norms: convolutions take over the norm, and where it is one the clamp, behind them."""

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.optimizer import register_optimizer_step_post_hook

from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.ops import sparse

# The activations that are clamps.
LIMITS = {
    type(None): (-torch.inf, torch.inf),
    nn.Identity: (-torch.inf, torch.inf),
    nn.ReLU: (0.0, torch.inf),
    nn.ReLU6: (0.0, 6.0),
}


_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


class Items:
    """Notices other parameters, buffers or submodules in modules."""

    def __init__(self, modules: Iterable[nn.Module]):
        # The modules are not kept: what is kept for a module must not keep it alive.
        owners = [own for one in modules for own in (one._modules, one._parameters, one._buffers)]
        self._owners = [own for own in owners if own]
        self._items = self._now()

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._owners)))

    def are_others(self) -> bool:
        """Whether they are others than when this was made."""
        items = self._now()
        return len(items) != len(self._items) or not all(map(is_, items, self._items))


class Watch(Items):
    """Notices besides: other values, other hooks, another mode.

    Not a change of values through `.data`, which leaves no trace.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(modules)
        super().__init__(modules)
        self._attributes = [vars(one) for one in modules]
        hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._hooks = [*hooks, *_GLOBAL_HOOKS]
        # Inference tensors count no versions.
        self._tensors = [item for item in self._items if isinstance(item, Tensor) and not item.is_inference()]
        self._state = self._counts()

    def _counts(self) -> tuple:
        versions = [tensor._version for tensor in self._tensors]
        modes = [(own["training"], own.get("eps")) for own in self._attributes]
        return versions, modes, sum(map(len, self._hooks))

    def sees_change(self) -> bool:
        """Whether something has changed since it was made."""
        return self.are_others() or self._counts() != self._state

    def watches(self, ids: set[int]) -> bool:
        """Whether any tensor of these is among what it notices."""
        return any(id(tensor) in ids for tensor in self._tensors)

    def devices(self) -> set[torch.device]:
        return {tensor.device for tensor in self._tensors}


# Not in the modules, whose copies must not share it: what it was made for, what could change it, and what was made.
_KEPT: "WeakKeyDictionary[KeepsFolded, tuple[Any, Watch, Any]]" = WeakKeyDictionary()


def _forget_changed(optimizer: torch.optim.Optimizer, *args) -> None:
    """Fused optimizers change parameters behind their version counters."""
    changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in [module for module, (_, watch, _) in _KEPT.items() if watch.watches(changed)]:
        _KEPT.pop(module, None)


register_optimizer_step_post_hook(_forget_changed)


def kept_for(module: nn.Module) -> tuple | None:
    """What is kept for a module; another object when it has been made anew."""
    return _KEPT.get(module)


class KeepsFolded(nn.Module):
    """Mixin of modules of which something folded is kept until they change."""

    def _keep(self, key: Any, left_out: Callable[[], Iterable[nn.Module]], make: Callable[[], Any]) -> Any:
        """What `make` gives, for this key; called again when the module has changed, but for the parts left out."""
        kept = _KEPT.get(self)
        if kept is None or kept[0] != key or kept[1].sees_change():
            kept = (key, Watch(modules_without(self, left_out())), make())
            for device in kept[1].devices():
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return kept[2]  # in the graph's memory, which holds nothing before a replay
                if device.type == "cuda":  # other streams may use it at once
                    torch.cuda.current_stream(device).synchronize()
            _KEPT[self] = kept
        return kept[2]

    # What follows may change weights behind their version counters.

    def train(self, mode: bool = True):
        _KEPT.pop(self, None)
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        _KEPT.pop(self, None)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        _KEPT.pop(self, None)
        return super()._load_from_state_dict(*args, **kwargs)


class Folded(NamedTuple):
    """A convolution with the batch norm and the activation behind it, for the operators of `ops.sparse`."""

    weight: Tensor
    bias: Tensor
    low: float
    high: float


def is_foldable(conv: nn.Module | None, norm: nn.Module | None, act: nn.Module | None) -> bool:
    """Whether `fold` knows these."""
    own = isinstance(conv, nn.Conv2d) and type(conv).forward is nn.Conv2d.forward
    if not own or not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.training:
        return False
    act = activation(norm, act)
    if type(act) not in LIMITS or any(has_hooks(module) for module in (conv, norm, act) if module is not None):
        return False
    return conv.padding_mode == "zeros" and conv.groups in (1, conv.in_channels)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what the module takes and gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks or any(_GLOBAL_HOOKS))


def activation(norm: nn.Module, act: nn.Module | None = None) -> nn.Module | None:
    return norm.act if isinstance(norm, BatchNormAct2d) else act


def fold(conv: nn.Conv2d, norm: nn.Module, act: nn.Module | None, dtype: torch.dtype) -> Folded:
    """Fold a batch norm in eval mode and an activation into a convolution.

    Args:
        conv, norm, act: Such that `is_foldable`.
        dtype: Of the result.
    """
    scale, bias = affine(norm)
    bias = bias if conv.bias is None else bias + conv.bias * scale
    kernel = conv.weight * scale[:, None, None, None]
    if conv.groups == 1:
        weight = sparse.pack_matrix(kernel.permute(2, 3, 1, 0).flatten(0, 2).to(dtype))
    else:
        weight = kernel.flatten(1).t().contiguous().to(dtype)
    return Folded(weight, bias.to(dtype), *LIMITS[type(activation(norm, act))])


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Slope and offset of a batch norm in eval mode, `[C]`."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def rows_of(x: Tensor) -> Tensor:
    """A channels_last map's positions, `[B*H*W, C]`, in the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


class _Pointwise(nn.Module):
    """A folded 1x1 convolution of channels_last maps."""

    def __init__(self, folded: Folded):
        super().__init__()
        self.folded = folded

    def forward(self, x: Tensor) -> Tensor:
        y = sparse.gather_conv(rows_of(x.contiguous(memory_format=torch.channels_last)), None, *self.folded)
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def normed_pairs(
    model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Conv2d
) -> list[tuple[nn.Module, str, str]]:
    """The convolutions that a batch norm in eval mode follows at once, in the order of definition.

    Args:
        model: Whose modules run in the order in which they are defined.
        kind: Of convolutions.

    Returns:
        The module they are in, and the names of both.
    """
    pairs = []
    # A dynamic layer's parts run in an order of their own.
    dynamic = [module for module in model.modules() if isinstance(module, DropInConv2d)]
    for parent in modules_without(model, dynamic):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            if not isinstance(conv, kind) or not isinstance(norm, nn.BatchNorm2d) or norm.training:
                continue
            if norm.running_mean is not None:
                pairs.append((parent, name, norm_name))
    return pairs


def modules_without(model: nn.Module, left_out: Iterable[nn.Module]) -> list[nn.Module]:
    """All modules of a model but some with all that is in them."""
    ignored = {id(module) for part in left_out for module in part.modules()}
    return [module for module in model.modules() if id(module) not in ignored]


def folded_copy(model: nn.Module, by_rows: bool = True) -> nn.Module:
    """A copy of a model in eval mode in which convolutions have taken over the batch norms behind them.

    All other parameters and buffers are those of the model itself.

    Args:
        model: As for `normed_pairs`.
        by_rows: On a CPU, run 1x1 convolutions by `ops.sparse` where its kernels serve.
    """
    memo = {id(item): item for item in (*model.parameters(), *model.buffers())}
    folded = copy.deepcopy(model, memo)
    for parent, name, norm_name in normed_pairs(folded):
        conv, norm = getattr(parent, name), getattr(parent, norm_name)
        pointwise = is_foldable(conv, norm, None) and conv.groups == 1
        pointwise = pointwise and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
        # On a GPU cuDNN's convolution is as good, and may use TF32 where a product may not.
        if by_rows and pointwise and conv.weight.device.type == "cpu" and sparse.kernels_serve(conv.weight):
            setattr(parent, name, _Pointwise(fold(conv, norm, None, conv.weight.dtype)))
            setattr(parent, norm_name, nn.Identity())
        else:
            setattr(parent, name, fuse_conv_bn_eval(conv, norm))
            setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))  # timm's may have an activation within
    return folded
