"""In which dtype operators and layers compute."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` takes part in a convolution: under autocast that of autocast, but for float64."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) and x.dtype != torch.float64 else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Within this context operators on the device of `x` keep the dtypes they are given."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of `x`; a "meta" tensor has none."""
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch 2.11 cannot compile a better test


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """In which operators on tensors like this one compute: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
