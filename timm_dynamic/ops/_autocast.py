"""What operators and layers ask about autocast; "meta" tensors, on which there is none, may ask too."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` takes part in a convolution: under autocast that of autocast, but for float64."""
    return torch.get_autocast_dtype(x.device.type) if _enabled(x) and x.dtype != torch.float64 else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Within this context operators on the device of `x` keep the dtypes they are given."""
    return torch.autocast(x.device.type, enabled=False) if _enabled(x) else nullcontext()


def _enabled(x: Tensor) -> bool:
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch 2.11 cannot compile a better test
