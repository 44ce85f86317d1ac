"""The dispatcher: which command runs, and how errors leave it."""

import runpy
import sys
import types

import pytest

from timm_dynamic import cli


@pytest.fixture
def command(monkeypatch):
    """Replaces the command `env` by a given function."""

    def replace(main):
        monkeypatch.setitem(sys.modules, "timm_dynamic.cli.env", types.SimpleNamespace(main=main))

    return replace


@pytest.mark.parametrize("argv, status", [([], 2), (["-h"], 0), (["--help"], 0)])
def test_usage(capsys, argv, status):
    assert cli.main(argv) == status
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: timm-dynamic {name}")


def test_list(capsys):
    assert cli.main(["list", "--family", "ped", "--names"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PEDConv") and "\n  ped_resnet18\n" in out and "--dynamize ped: PEDConv2d" in out


@pytest.mark.parametrize("name", ["digit", "--nonsense", "", "common", "../env"])
def test_unknown_command(capsys, name):
    assert cli.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert repr(name) in err and ("digits" in err or name == "../env")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError])
def test_errors_are_one_line(capsys, command, error):
    def main(args):
        raise error("bad\n  input")

    command(main)
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "timm-dynamic env: error: bad input\n"


def test_faults_of_ours_are_not_hidden(command):
    def main(args):
        raise AttributeError("a bug")

    command(main)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(["env"])


def test_interrupt(command):
    def main(args):
        raise KeyboardInterrupt

    command(main)
    assert cli.main(["env"]) == 130


def test_status_of_the_command(command):
    command(lambda args: 3)
    assert cli.main(["env"]) == 3


def test_as_a_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["timm-dynamic", "nonsense"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("timm_dynamic.cli", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("timm-dynamic: error: ") and err.count("\n") == 1
