"""The CPU kernels for lesser instruction sets than this machine's best, which serves all other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_dynamic.ops import backend_info

# What runs no CPU kernel, or nothing else of it; torch.compile cannot be trusted under this variable.
OTHERS = "cuda reference registration operator_check opcheck gradcheck derivative wanted compile export".split()
OTHERS += "definition bad refuse transforms".split()
FILES = "dynamic_filter filter_norm sparse mask_logits cpu_kernels".split()


@pytest.mark.skipif(backend_info()["cpu"] != "loaded", reason=f"CPU kernel {backend_info()['cpu']}")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels(capability):
    if capability.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip(f"{capability} is the best that this machine has")
    files = (str(Path(__file__).with_name(f"test_{name}.py")) for name in FILES)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(OTHERS)})", *files]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
