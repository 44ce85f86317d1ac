"""Loads the compiled kernels and says which of them serve.

The binaries hold kernels alone; every operator is defined in Python beside its reference, so a missing binary costs
speed and nothing else.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

NAMESPACE = "timm_dynamic"
_BINARIES = {"cpu": "_cpu.so", "cuda": "_cuda.so"}
_status: dict[str, str] = {}  # device type -> "loaded", or why not
_untried = {"cuda"}  # what may be loaded and not run: this GPU or its driver may be too old
_forced: bool | None = None  # what `reference_only` and `operators_only` want instead of the usual choice


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


def _is_loaded(device_type: str) -> bool:
    """That it is, and runs here."""
    if device_type in _untried and not torch.compiler.is_compiling():
        try_cuda()
    return _status.get(device_type) == "loaded"


def try_cuda() -> None:
    """Once CUDA is in use, find out whether the loaded kernels run; if not, `backend_info` says why."""
    if _status.get("cuda") != "loaded" or not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return
    _untried.discard("cuda")
    one = torch.ones(1, device="cuda")
    try:
        torch.ops.timm_dynamic.affine_(one.view(1, 1, 1, 1), one, one, 0.0, 1.0)
    except RuntimeError as error:
        _status["cuda"] = f"loaded, but do not run here: {str(error).splitlines()[0]}"


def has_kernel(device_type: str) -> bool:
    """Whether a compiled kernel serves tensors of this device type; where one could but does not, warns once."""
    if _forced is not None:
        return _forced
    if _is_loaded(device_type):
        return True
    if device_type in _status and not torch.compiler.is_compiling():
        _warn_once(device_type)
    return False


_MAX_SHORTCUT_BATCH = 32  # still faster there; more was not measured


def inference_kernel_serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the CPU kernel of an operator without gradient may serve: float32, no gradient, no autocast, no graph.

    Nor is it for those who chose between kernels and references, or count operations: they look at the small ones.
    """
    return (
        _is_plain_inference(x, "cpu")
        and all(t.dtype == torch.float32 for t in (x, *parameters))
        and not torch.is_autocast_enabled("cpu")
    )


CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the operators without gradient


def cuda_inference_kernel_serves(x: Tensor, *parameters: Tensor) -> bool:
    """Likewise on a GPU; under autocast too, where x often has another dtype than the parameters."""
    dtype = parameters[0].dtype
    return (
        _is_plain_inference(x, "cuda")
        and x.dtype in CUDA_DTYPES
        and dtype in (torch.float32, x.dtype)
        and all(t.dtype == dtype for t in parameters)
    )


def _is_plain_inference(x: Tensor, device_type: str) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: what follows would make a graph's shapes constant
        and not torch.jit.is_tracing()
        and _forced is None
        and _is_loaded(device_type)
        and x.device.type == device_type
        and x.numel() > 0
        and not torch.is_grad_enabled()
    )


def shortcut_serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether an operator may serve that fuses a layer's small operations: it is there for NCHW and few samples."""
    return inference_kernel_serves(x, *parameters) and fuses_few(x, *parameters)


def fuses_few(x: Tensor, *parameters: Tensor) -> bool:
    """Whether it may where `inference_kernel_serves`."""
    return 0 < x.shape[0] <= _MAX_SHORTCUT_BATCH and all(t.is_contiguous() for t in (x, *parameters))


def cuda_shortcut_serves(x: Tensor, *parameters: Tensor) -> bool:
    """Likewise on a GPU, for either layout."""
    return (
        cuda_inference_kernel_serves(x, *parameters)
        and x.shape[0] <= _MAX_SHORTCUT_BATCH
        and x.numel() < 2**31
        and all(t.is_contiguous() for t in parameters)
    )


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """In which operators on tensors like this compute."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_warned: set[str] = set()


def _warn_once(device_type: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"timm_dynamic: {device_type} kernels {_status[device_type]}. The pure-PyTorch code serves: same results, "
            "slower. `timm-dynamic env` shows the details.",
            stacklevel=3,
        )


def counting_operations() -> bool:
    """Whether this runs within `operators_only`."""
    return _forced is True


def reference_only() -> AbstractContextManager[None]:
    """Within this context the public operators run their plain-PyTorch reference, kernels or not."""
    return _force(False)


def operators_only() -> AbstractContextManager[None]:
    """Within this context a public operator is one dispatcher call, kernels or not: for what counts such calls."""
    return _force(True)


@contextmanager
def _force(choice: bool) -> Iterator[None]:
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def backend_info() -> dict[str, str]:
    """Which compiled kernels are loaded, by device type (``"cpu"``, ``"cuda"``): ``"loaded"``, or why not."""
    return dict(_status)
