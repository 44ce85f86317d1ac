"""What every dynamic layer shares: its one `forward`, a convolution's arguments, `from_conv`, an author's weights."""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.dispatch import changed_part, choose
from timm_dynamic.layers.argument_types import check_types
from timm_dynamic.layers.stand_in import conv_weight_shape, stand_in_weight
from timm_dynamic.ops.precision import autocast_dtype, is_autocast, no_autocast

Layer = TypeVar("Layer", bound="DynamicLayer")
# What a subclass may define anew without changing what the layer computes.
_STATED = {"family", "implementations"}
_SETUP = {"from_conv", "start_from", "unite", "reset_parameters", "routing"}


class DynamicLayer(nn.Module):
    """A layer whose `formula` says what it computes, and which may have faster ways to compute it.

    A subclass defines `formula`, which calls the submodules of the layer and nothing but plain PyTorch and the public
    functions of `timm_dynamic.ops`; it is right in every situation. `forward` runs it, unless a row of
    `implementations` gives the same faster (`timm_dynamic.dispatch.choose`).

    A subclass of a family's layer that defines a method of it anew always runs by its formula, and absorbs nothing,
    unless it sets `family` or `implementations`, too.

    Attributes:
        family: Name of the family, for `timm_dynamic.use`.
        implementations: The faster ways, first the preferred one.
        parts: Type and name of every submodule that these read instead of calling it.
        shared: Names of submodules that several layers of a network have.
        preferred: Name of an implementation that need not pay, or None.
        limits: Of the output, lower and upper, where `timm_dynamic.optimize` has put an activation into the layer.
        settled: What `timm_dynamic.optimize` has found out about the choice, or None.
        overridden: Names of the methods that a subclass of a family's layer defines anew.
    """

    # Without annotations, which TorchScript would read.
    family = ""
    implementations = ()
    parts = ()
    shared = ()
    preferred = None
    limits = None
    settled = None
    overridden = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.overridden = _overridden(cls)

    def __new__(cls, *args, **kwargs):
        check_types(cls, kwargs)
        return super().__new__(cls)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if torch.jit.is_scripting():
            return self.formula(x)
        else:
            return self._dispatch(x)

    @torch.jit.unused
    def _dispatch(self, x: Tensor) -> Tensor:
        settled = self.settled
        if settled is not None and settled.holds(self, x):
            return settled.run(x)
        implementation = choose(self, x)
        if implementation is not None:
            return implementation.run(self, x)
        y = self.formula(x)
        if is_autocast(x):
            y = y.to(autocast_dtype(x))  # as the convolution of the same input
        return y if self.limits is None else y.clamp(*self.limits)

    def formula(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        shown = getattr(type(self), name, None)
        if isinstance(shown, property):  # of a weight or bias that the layer does not have as such
            shown.__set__(self, param)
        else:
            super().register_parameter(name, param)

    def factors_of(self, x: Tensor):
        """`self.factors(x)`, what the layer makes of a sample, without autocast and in the parameters' precision.

        What pools activations, or multiplies them by each other, exceeds what float16 holds.
        """
        if torch.jit.is_scripting():
            return self.factors(x)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32)) if is_autocast(x) else x
            with no_autocast(x):
                return self.factors(wide)

    @torch.jit.unused
    def absorb(self: Layer, scale: Tensor, shift: Tensor) -> Layer:
        """A copy of the layer that gives `scale * y + shift` for the output y in eval mode: a norm behind it.

        The parameters of the copy take the map over, so that the formula needs nothing behind it. What the layer shares
        with others (`shared`), the copy shares, too.

        Args:
            scale, shift: One number for each output channel.

        Raises:
            ValueError: If a part of the layer is not what the layer made it: hooked, wrapped, replaced, parametrized.
        """
        self._check_parts()
        layer = copy.deepcopy(self, {id(part): part for part in map(self.get_submodule, self.shared)})
        layer.take_over(scale, shift)
        return layer

    @torch.jit.unused
    def take_over(self, scale: Tensor, shift: Tensor) -> None:
        """`absorb`, in place."""
        self._check_parts()
        with torch.no_grad():
            self._absorb(scale, shift)

    @torch.jit.unused
    def _check_parts(self) -> None:
        reason = changed_part(self) if has_plain_forward(self) else "its class has another forward"
        if reason is not None:
            raise ValueError(f"a dynamic layer cannot absorb a norm: {reason}")

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        """`absorb`, in place and without gradients."""
        raise ValueError(f"a dynamic layer cannot absorb a norm: {type(self).__name__} has no way to")

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], got shape {list(x.shape)}")


def has_plain_forward(layer: nn.Module) -> bool:
    """Whether nothing comes before or after what a dynamic layer computes; True for other modules."""
    return not isinstance(layer, DynamicLayer) or type(layer).forward is DynamicLayer.forward


def _overridden(cls: type[DynamicLayer]) -> list[str]:
    """The methods and properties that are newer than the class that sets `family` or `implementations`."""
    index, known = next((i, c) for i, c in enumerate(cls.__mro__) if not _STATED.isdisjoint(vars(c)))
    if known is DynamicLayer:
        return []
    newer = (item for c in cls.__mro__[:index] for item in vars(c).items())
    methods = [name for name, value in newer if callable(value) or isinstance(value, property)]
    return [n for n in methods if hasattr(known, n) and not hasattr(nn.Module, n) and n not in _SETUP]


class DropInConv2d(DynamicLayer):
    """Base of the layers that stand in for an `nn.Conv2d`: its constructor arguments, checked, and its attributes.

    A subclass takes these arguments in this order, then `device` and `dtype`, then keyword arguments of its own. It has
    a parameter or `stand_in_bias` named `bias`, and none named `weight`.

    Attributes:
        exact: Keyword arguments with which a new layer can give what a convolution gives.
    """

    weight = stand_in_weight(conv_weight_shape)
    exact = {}
    __jit_unused_properties__ = ["weight"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            if min(value if isinstance(value, (tuple, list)) else (value,)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # nn.Conv2d itself checks the rest and turns integers into pairs; on the meta device that costs no memory.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding_mode = padding_mode
        self.output_padding = conv.output_padding
        self.transposed = False
        # What a convolution operator pads by itself, and what `pad` has to do before.
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        explicit = padding_mode != "zeros" or left != right or top != bottom
        self.zero_padding = (0, 0) if explicit else (top, left)
        self.explicit_padding = [left, right, top, bottom] if explicit else None

    def _apply(self, fn, recurse: bool = True):
        # `Module.to(memory_format=torch.channels_last)` changes the layout of kernels, which are read as they are: then
        # by the formula alone, in up to twice the time (ped_resnet18, an AMD EPYC, November 2026).
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        return self

    def pad(self, x: Tensor) -> Tensor:
        if self.explicit_padding is None:
            return x
        return F.pad(x, self.explicit_padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    extra_repr = nn.Conv2d.extra_repr

    @classmethod
    def from_conv(cls: type[Layer], conv: nn.Conv2d, *, from_scratch: bool = False, **kwargs) -> Layer:
        """Build the layer that replaces `conv`: same shapes, device, dtype and mode, and its bias if it has one.

        What is taken from a frozen `conv` is frozen too.

        Args:
            conv: A convolution with `nn.Conv2d`'s own forward.
            from_scratch: Take over nothing of its weights, for a network that is trained from the beginning: the layer
                is then as its authors initialise it.
            **kwargs: The layer's own keyword arguments.

        Raises:
            ValueError: If this layer cannot stand in for `conv`.
        """
        if not isinstance(from_scratch, bool):
            raise ValueError(f"from_scratch must be True or False, got {from_scratch!r}")
        plain = nn.Conv2d
        if not isinstance(conv, plain) or type(conv).forward is not plain.forward:
            raise ValueError(f"{cls.__name__}.from_conv takes an nn.Conv2d with its own forward, got {type(conv)}")
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        layer = cls(
            *(getattr(conv, name) for name in names),
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **(kwargs if from_scratch else {**cls.exact, **kwargs}),
        )
        if from_scratch:
            return layer.train(conv.training)
        with torch.no_grad():
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
            layer.start_from(conv)
        return layer.train(conv.training)

    @torch.jit.unused
    def start_from(self, conv: nn.Conv2d) -> None:
        """Take over what can be of a convolution, without gradients; a `bias` that is a parameter is taken already."""

    @classmethod
    def unite(cls, pairs: dict[str, tuple[nn.Conv2d, Layer]], from_scratch: bool) -> None:
        """Let new layers share what layers of this kind share, without gradients.

        Args:
            pairs: By their names in a network, in the order of its modules, the convolutions and what `from_conv` made
                of each.
            from_scratch: As for `from_conv`.
        """


class AffineOutputs(DropInConv2d):
    """Base of layers whose kernels cannot take over a map of the output channels: it comes behind the convolution.

    Attributes:
        gain: Of the output channels, where a norm has been absorbed, else None.
    """

    def add_outputs(self, bias: bool, **dd) -> None:
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_channels, **dd)) if bias else None)
        self.register_parameter("gain", None)

    def finish(self, y: Tensor) -> Tensor:
        """Gain and bias."""
        if self.gain is not None:
            y = y * self.gain[:, None, None].to(y.dtype)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    @torch.jit.unused
    def _absorb(self, scale: Tensor, shift: Tensor) -> None:
        self.gain = nn.Parameter(scale if self.gain is None else self.gain * scale)
        self.bias = nn.Parameter(shift if self.bias is None else self.bias * scale + shift)


def parts_of(name: str, module: nn.Module) -> tuple[tuple[type[nn.Module], str], ...]:
    """A layer's part and its children, for `parts`: where implementations read all of them."""
    children = ((type(part), f"{name}.{child}") for child, part in module.named_children())
    return ((type(module), name), *children)


def in_dtype_of(x: Tensor, part: nn.Module) -> Tensor:
    """`part(x)`, in the dtype of `x` even where the part's parameters and running statistics are of another one."""
    others, statistics = (
        {name: value.to(x.dtype) for name, value in named if value.is_floating_point() and value.dtype != x.dtype}
        for named in (part.named_parameters(), part.named_buffers())
    )
    if not others and not statistics:
        return part(x)
    y = torch.func.functional_call(part, {**others, **statistics}, (x,))
    for name, value in statistics.items() if part.training else ():
        part.get_buffer(name).copy_(value)
    return y


def check_positive(**arguments: int | None) -> None:
    """Raise a ValueError that names an argument below 1, None apart."""
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def draw_as_conv(fan_in: int, *parameters: Tensor | None) -> None:
    """Draw weights and biases, None apart, as `nn.Conv2d` does."""
    for parameter in parameters:
        if parameter is not None:
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


def copy_weight(conv: nn.Conv2d, weight: Tensor) -> None:
    """Copy a convolution's weight, and freeze the copy if the convolution is frozen."""
    weight.copy_(conv.weight).requires_grad_(conv.weight.requires_grad)


def load_reference(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a single layer from a state dict with its authors' key names, strictly.

    Args:
        layer: One of this package's layers. Its `reference_names`, if any, maps names of the authors' modules to ours.
        state: The authors' tensors.

    Raises:
        ValueError: If keys are missing, unexpected, or of another shape; all are named.
    """
    names = getattr(layer, "reference_names", {})
    try:
        layer.load_state_dict({rename(key, names): value for key, value in state.items()})
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None


def rename(key: str, names: dict[str, str]) -> str:
    """A state dict's key with its first part, the name of a module, replaced if `names` has it."""
    first, dot, rest = key.partition(".")
    return names.get(first, first) + dot + rest
