import safetensors
import timm
import torch

import timm_dynamic
from timm_dynamic import cli
from timm_dynamic.cli import env


def run(capsys):
    assert cli.main(["env"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return dict(line.split(maxsplit=1) for line in out.splitlines() if "kernels" not in line), out


def test_versions(capsys):
    values, _ = run(capsys)
    assert values["timm_dynamic"] == timm_dynamic.__version__
    assert values["torch"] == torch.__version__
    assert values["timm"] == timm.__version__
    assert values["safetensors"] == safetensors.__version__
    assert torch.backends.cpu.get_cpu_capability() in values["cpu"]


def test_kernels(capsys, monkeypatch):
    monkeypatch.setattr(env, "backend_info", lambda: {"cpu": "loaded", "cuda": "not built: no nvcc"})
    lines = [line.split(maxsplit=2) for line in run(capsys)[1].splitlines()]
    assert ["cpu", "kernels", "loaded"] in lines
    assert ["cuda", "kernels", "not built: no nvcc"] in lines


def test_gpus_and_absent_packages(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(env, "_PACKAGES", ("no-such-package",))
    values, _ = run(capsys)
    assert values["gpu"] == "GPU 0, GPU 1"
    assert values["no-such-package"] == "not installed"
