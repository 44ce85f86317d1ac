"""Importing the package must cost little more than importing timm."""

import subprocess
import sys
from pathlib import Path

MODELS = Path(__file__).parents[1] / "timm_dynamic" / "models"
SCRIPT = """
import importlib, sys
import timm
before = set(sys.modules)
importlib.import_module("timm_dynamic")
assert timm.is_model("test_ddf_resnet")
print(*sorted(set(sys.modules) - before))
"""


def test_only_own_modules_are_imported():
    """Every file of models, because it is in the folder; also as timm's `train.py --device-modules` imports us."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    extra = done.stdout.split()
    print("beyond what timm imports:", *extra, sep="\n")
    files = {f"timm_dynamic.models.{path.stem}" for path in MODELS.glob("*.py")} - {"timm_dynamic.models.__init__"}
    assert files < set(extra)
    packages = {name.split(".")[0] for name in extra} - sys.stdlib_module_names
    assert packages <= {"timm_dynamic", "timm", "torch", "safetensors", "huggingface_hub"}
    assert not {"timm_dynamic.cli", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"} & set(extra)
    assert sum(not name.startswith("timm_dynamic") for name in extra) < 25
