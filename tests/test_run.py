import subprocess
import sys

import pytest

SCRIPT = """
import sys
import timm
from helper import VALUE
assert __name__ == "__main__" and sys.modules["__main__"].VALUE == VALUE
print(timm.is_model("ddf_mul_resnet50"), VALUE, __file__, sys.argv)
sys.exit(int(sys.argv[-1]))
"""


def run(*argv, cwd, python=()):
    command = [sys.executable, *python, "-m", "timm_dynamic.run", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_runs_a_script_as_python_does(tmp_path):
    """Our models are registered; the script's name, folder, arguments and status are what it expects."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("VALUE = 7")
    (tmp_path / "helper.py").write_text("VALUE = 'the helper of another folder'")
    done = run("scripts/script.py", "--flag", "-h", "3", cwd=tmp_path)
    assert done.stdout == "True 7 scripts/script.py ['scripts/script.py', '--flag', '-h', '3']\n", done.stderr
    assert done.returncode == 3

    (tmp_path / "link.py").symlink_to(folder / "script.py")  # Python looks for modules beside the file it leads to
    assert run("link.py", "0", cwd=tmp_path).stdout.startswith("True 7 link.py")


@pytest.mark.parametrize("argv, problem", [((), "name a script"), (("nowhere.py", "x"), "no such script: nowhere.py")])
def test_no_script(tmp_path, argv, problem):
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"timm_dynamic.run: error: {problem} (usage: python -m timm_dynamic.run [--optimize] SCRIPT ARGS...)\n"
    )


def test_upstream_way_of_importing_us(tmp_path):
    """timm's train.py imports `--device-modules timm_dynamic`: that alone registers the models."""
    code = "import importlib, timm; importlib.import_module('timm_dynamic'); print(timm.is_model('test_ddf_resnet'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr


OPTIMIZED = """
import torch
from timm import create_model
from timm.models import create_model as other

assert create_model is other
model = create_model("test_resnet", num_classes=5)
twin = create_model("test_resnet", num_classes=5).eval()
x = torch.randn(2, 3, 64, 64)
for seed in range(2):  # weights that are loaded after creation count
    torch.manual_seed(seed)
    twin.load_state_dict({k: torch.rand_like(v.float()) for k, v in twin.state_dict().items()})
    model.load_state_dict(twin.state_dict())
    model.eval()
    expected = twin(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
try:
    model.train()
except ValueError as error:
    print(error)
"""


def test_optimize(tmp_path):
    (tmp_path / "script.py").write_text(OPTIMIZED)
    done = run("--optimize", "script.py", cwd=tmp_path)
    assert done.returncode == 0 and "do not train" in done.stdout, done.stderr
    assert done.stderr.count("timm_dynamic.run: optimized test_resnet") == 2
    assert done.stderr.count("took over the norm behind") == 2
