"""Loads the compiled kernels and says which of them may run.

The binaries hold kernels alone; every operator is defined in Python, so a missing binary costs speed and nothing else.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from timm_dynamic.ops import records

NAMESPACE = "timm_dynamic"
FORMULA = "formula"
KERNEL = "kernel"
EVERYTHING = "everything"
_BINARIES = {"cpu": "_cpu.so", "cuda": "_cuda.so"}
_status: dict[str, str] = {}  # device type -> "loaded", or why not
_choices: ContextVar[Mapping[str, str]] = ContextVar("choices", default=MappingProxyType({}))


def load_kernels() -> None:
    """Load the binary of every device type that this torch can use. Never raises."""
    for device_type, name in _BINARIES.items():
        path = Path(__file__).parent.parent / name
        if os.environ.get("TIMM_DYNAMIC_KERNELS") == "0":
            _status[device_type] = "not loaded: TIMM_DYNAMIC_KERNELS=0"
        elif device_type == "cuda" and torch.version.cuda is None:
            _status[device_type] = "not loaded: this torch has no CUDA support"
        elif not path.exists():
            _status[device_type] = "not built when this was installed (see README, Install)"
        else:
            try:
                torch.ops.load_library(path)
                _status[device_type] = "loaded"
            except OSError as error:
                _status[device_type] = f"not loaded: {str(error).splitlines()[0]}"


def backend_info() -> dict[str, str]:
    """Which compiled kernels are loaded, by device type (``"cpu"``, ``"cuda"``): ``"loaded"``, or why not.

    Those of a GPU are off until a measurement shows them as faster there; it says how many are on, and what to run.
    """
    return {device_type: _in_words(device_type) for device_type in _status}


def _in_words(device_type: str) -> str:
    if device_type == "cpu" or not is_loaded(device_type):
        return _status[device_type]
    names = operators_with_kernel(device_type)
    if not torch.cuda.is_available():
        return "loaded, but there is no CUDA device"
    on = sum(is_measured(device_type, name) for name in names)
    return f"loaded; {on} of {len(names)} are on: `timm-dynamic check --device {device_type}` measures them"


def is_loaded(device_type: str) -> bool:
    """Whether the binary for this device type is."""
    return _status.get(device_type) == "loaded"


def operators_with_kernel(device_type: str) -> list[str]:
    """The operators that have a compiled kernel for this device type."""
    prefix, has = f"{NAMESPACE}::", torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    return sorted(name.removeprefix(prefix) for name in names if has(name, device_type.upper()))


def choice(name: str) -> str | None:
    """What `timm_dynamic.use` asks for in this context, for a family or an operator; None: the usual way."""
    choices = _choices.get()
    return choices.get(name, choices.get(EVERYTHING)) if choices else None


@contextmanager
def choose_in_context(choices: Mapping[str, str]) -> Iterator[None]:
    """Within this context `choice` answers so; a context variable, so that other threads do not notice."""
    token = _choices.set(MappingProxyType({**_choices.get(), **choices}))
    try:
        yield
    finally:
        _choices.reset(token)


def transforms() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation goes on."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def unusual(x: Tensor) -> str | None:
    """Why a call is to be made of plain PyTorch operations, as far as the tensor and its surroundings say; or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"the input is a {type(x).__name__}"
    return None


def is_plain(x: Tensor) -> bool:
    """Whether a call on a CPU is eager, of a float32 tensor, and nothing looks at its operations or changes them."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not is_watched()
        and not transforms()
    )


def has_choices() -> bool:
    """Whether `timm_dynamic.use` asks for anything in this context."""
    return bool(_choices.get())


def exports_to_onnx() -> bool:
    """Whether a graph is made for ONNX, of the operations of `torch.export`: not by tracing, as exporters once did."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def runs_registered(operator: str, x: Tensor) -> bool:
    """Whether a public operator is to be one call of its registered form, else its definition in plain PyTorch.

    The registered form has gradients and a fake for torch.compile, and saves memory; the definition is for what
    transforms, differentiates forwards or exports.

    Args:
        operator: Its name.
        x: One of its inputs.
    """
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if torch.onnx.is_in_onnx_export() or unusual(x) is not None:
        return False
    return choice(operator) != FORMULA or is_watched()


def runs_kernel(operator: str, x: Tensor) -> bool:
    """`runs_registered`, for an operator whose registered form is better than its definition by its kernel alone."""
    if not runs_registered(operator, x):
        return False
    return (not torch.compiler.is_compiling() and is_watched()) or has_kernel(x.device.type, operator)


def is_watched() -> bool:
    """Whether a dispatch mode, such as a counter of operations, sees all calls: it knows operators, kernels or not."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_kernel(device_type: str, operator: str) -> bool:
    """Whether a compiled kernel may run on tensors of this device type; where the binary is missing, warns once."""
    if device_type not in _status:
        return False
    if _status[device_type] != "loaded":
        if device_type == "cpu" and not torch.compiler.is_compiling():
            _warn_once(device_type)
        return False
    if device_type == "cpu":
        return True
    if not torch.compiler.is_compiling() and choice(operator) == KERNEL:
        return True
    return is_measured(device_type, operator)


@torch.compiler.assume_constant_result
def is_measured(device_type: str, name: str) -> bool:
    """Whether a kernel may run by default on this type of device: on a CPU, or where a record shows it as faster.

    Args:
        device_type: `"cuda"` is the current device.
        name: Of an operator, or of a row: `"FAMILY: NAME"`.
    """
    return device_type == "cpu" or (device_type == "cuda" and name in records.names_on(device_type))


_warned: set[str] = set()


def _warn_once(device_type: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"timm_dynamic: {device_type} kernels {_status[device_type]}. The pure-PyTorch code runs: same results, "
            "slower. `timm-dynamic env` shows the details.",
            stacklevel=3,
        )
