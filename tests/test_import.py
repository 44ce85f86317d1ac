"""Importing the package must cost little more than importing timm."""

import subprocess
import sys

SCRIPT = """
import sys
import timm
before = set(sys.modules)
import timm_dynamic
print(*sorted(set(sys.modules) - before))
"""


def test_only_own_modules_are_imported():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    extra = done.stdout.split()
    print("beyond what timm imports:", *extra, sep="\n")
    assert "timm_dynamic.models" in extra
    packages = {name.split(".")[0] for name in extra} - sys.stdlib_module_names
    assert packages <= {"timm_dynamic", "timm", "torch", "safetensors", "huggingface_hub"}
    assert not {"timm_dynamic.cli", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"} & set(extra)
    assert sum(not name.startswith("timm_dynamic") for name in extra) < 25
