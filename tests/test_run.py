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


FORKED = """
import sys
from timm_dynamic.run import main
sys.argv, sys.path[0] = {argv}, "not the folder of the script"
main()
"""


@pytest.fixture
def run(processes, tmp_path):
    """`run(*argv)` runs it in a forked process, in `tmp_path`: status, and stdout with stderr."""

    def start(*argv):
        return processes.run(folder=tmp_path, code=FORKED.format(argv=["", *argv]))

    return start


def test_runs_a_script_as_python_does(run, tmp_path):
    """Our models are registered; the script's name, folder, arguments and status are what it expects."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("VALUE = 7")
    (tmp_path / "helper.py").write_text("VALUE = 'the helper of another folder'")
    command = [sys.executable, "-m", "timm_dynamic.run", "scripts/script.py", "--flag", "-h", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True 7 scripts/script.py ['scripts/script.py', '--flag', '-h', '3']\n", done.stderr
    assert done.returncode == 3

    (tmp_path / "link.py").symlink_to(folder / "script.py")  # Python looks for modules beside the file it leads to
    status, log = run("link.py", "0")
    assert status == 0 and log.startswith("True 7 link.py"), log


@pytest.mark.parametrize("argv, problem", [((), "name a script"), (("nowhere.py", "x"), "no such script: nowhere.py")])
def test_no_script(run, argv, problem):
    usage = "(usage: python -m timm_dynamic.run [--optimize] SCRIPT ARGS...)"
    assert run(*argv) == (2, f"timm_dynamic.run: error: {problem} {usage}\n")


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


def test_optimize(run, tmp_path):
    (tmp_path / "script.py").write_text(OPTIMIZED)
    status, log = run("--optimize", "script.py")
    assert status == 0 and "do not train" in log, log
    assert log.count("timm_dynamic.run: optimized test_resnet") == 2
    assert log.count("took over the norm behind") == 2
