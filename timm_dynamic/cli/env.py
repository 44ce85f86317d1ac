"""`timm-dynamic env`: what a bug report should say about the installation."""

import argparse
import os
import platform
from importlib import metadata

import torch

from timm_dynamic import __version__, backend_info

_PACKAGES = ("torchvision", "timm", "safetensors", "huggingface_hub")


def environment() -> dict[str, str]:
    """Versions, devices and kernels of this installation, by name."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "timm_dynamic": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "cuda (torch's)": torch.version.cuda or "none",
        "gpu": ", ".join(gpus) or "none",
        "cpu": cpu,
        **{f"{device_type} kernels": status for device_type, status in backend_info().items()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(args: argparse.Namespace) -> None:
    for name, value in environment().items():
        print(f"{name:<16} {value}")
