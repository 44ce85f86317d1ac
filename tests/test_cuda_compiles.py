"""nvcc, where there is one, takes the CUDA kernels as the build gives them to it; no GPU is needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

KERNELS = Path(__file__).parents[1] / "cuda_ops"
NVCC = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
FLAGS = ["-ptx", "-arch=compute_80", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(KERNELS.rglob("*.cu")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_compiles(source, tmp_path):
    includes = (f"-I{folder}" for folder in (KERNELS, Path(torch.__file__).parent / "include"))
    flags = [*FLAGS, *cpp_extension.COMMON_NVCC_FLAGS]  # these take the 16-bit types' conversions away
    command = [NVCC, *flags, *includes, str(source), "-o", str(tmp_path / "kernels.ptx")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
