"""What the tests of the CUDA kernels share. `benchmarks/gpu.sh` finds them by the name `needs_gpu`."""

import pytest
import torch

from timm_dynamic import backend_info
from timm_dynamic.ops.kernels import is_loaded

DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# A map's dtype, and whether what is no map is float32 beside it.
MIXED_DTYPES = pytest.mark.parametrize(
    ("dtype", "wide"), [(d, w) for d in TOLERANCE for w in (False, True) if not w or d != torch.float32], ids=str
)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def _why_not(tensor_cores: bool) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if tensor_cores and torch.cuda.get_device_capability() < (8, 0):
        return "this GPU's tensor cores do not take bfloat16"
    return None if is_loaded("cuda") else f"CUDA kernels {backend_info()['cuda']}"


def needs_gpu(tensor_cores: bool = False) -> list[pytest.MarkDecorator]:
    """The `pytestmark` of a file whose tests need a GPU and the kernels."""
    why = _why_not(tensor_cores)
    return [pytest.mark.cuda, pytest.mark.skipif(why is not None, reason=str(why))]
