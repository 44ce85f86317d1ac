"""Runs the CUDA kernels of cuda_ops/ on the CPU, where there is no GPU and no CUDA toolkit.

`load(folder, "ddf")` compiles cuda_ops/ddf_cuda*.{cu,cpp}, both kernels and operators, with g++ for an emulation of
CUDA: include/ has the headers, runtime.cpp says how it works and what it reports. The operators are registered as
`torch.ops.timm_dynamic_on_host.*` and take CPU tensors. What a test needs of it:

    pytestmark = cuda_on_host.needs_compiler
    operators = cuda_on_host.operators("ddf")  # a fixture


    def test(operators):
        operators.ddf(features, channel_filter, spatial_filter, 3, 1, 1, "mul", seed=2)
"""

import ctypes
import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cuda_ops"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="no g++ on Linux")
NAMESPACE = "timm_dynamic_on_host"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-DUSE_CUDA"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall", "-Wno-unknown-pragmas"]
# Every access to memory becomes a call of a function of runtime.cpp. `make sanitize` has nothing to do with this.
CHECKS = ["-fsanitize=kernel-address", "-fsanitize=alignment", "-D__CUDACC__", "-include", "cuda_runtime.h"]
CHECKS += ["--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=0", "--param=asan-globals=1"]


class Operators:
    """Each operator as an attribute: a function that runs it and raises `RuntimeError` with what a GPU would not do."""

    def __init__(self, library: Path, names: Iterable[str]):
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_on_host_error.restype = ctypes.c_char_p
        for name in names:
            schema = str(getattr(torch.ops.timm_dynamic, name).default._schema).removeprefix("timm_dynamic::")
            torch.library.define(f"{NAMESPACE}::{name}", schema.removeprefix(name))
            setattr(self, name, functools.partial(self._run, getattr(torch.ops, NAMESPACE), name))

    def _run(self, operators, name: str, *args, seed: int = 0, processors: int = 4):
        """`seed` decides about the order of threads and blocks: 0 ascending, 1 descending, else at random."""
        self._library.cuda_on_host_begin(seed, processors)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            result = getattr(operators, name)(*args)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        if error := self._library.cuda_on_host_error().decode():
            raise RuntimeError(f"{name} did not see what its kernel met: {error}")
        return result


def operators(stem: str):
    """A fixture: the `Operators` of cuda_ops/`stem`_cuda*, compiled once a test run."""

    @pytest.fixture(scope="session")
    def operators(tmp_path_factory):
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent  # that of all workers
        return load(folder / "cuda_on_host", stem)

    return operators


def load(folder: Path, stem: str, sources: Iterable[Path] | None = None) -> Operators:
    """Compiles what cuda_ops/`stem`_cuda* has, or other sources, into `folder`, unless that was done before."""
    sources = [Path(p) for p in sources or sorted(KERNELS.glob(f"{stem}_cuda*.c*"))]
    library = folder / f"{stem}_on_host.so"
    names = [name for p in sources for name in re.findall(r'm\.impl\("(\w+)"', p.read_text())]
    folder.mkdir(exist_ok=True)
    with open(folder / f"{stem}.lock", "w") as lock:  # of the processes of pytest-xdist, one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, sources)
    return Operators(library, names)


def _compile(library: Path, sources: list[Path]) -> None:
    includes = [HERE / "include", KERNELS, *cpp_extension.include_paths("cpu")]
    objects = []
    for source in (*sources, HERE / "runtime.cpp"):
        text = source.read_text()
        text = re.sub(
            r"extern __shared__ (?:(?:__align__|alignas)\(\d+\) )?(\w[\w ]*) (\w+)\[\];",
            r"\1* const \2 = static_cast<\1*>(cuda_on_host::dynamic_shared());",
            text,
        )
        text = re.sub(
            r"STABLE_TORCH_LIBRARY_IMPL\(timm_dynamic, CUDA, m\)",
            f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)",
            text,
        )
        copy = library.parent / f"{library.stem}_{source.stem}_{source.suffix[1:]}.cpp"
        copy.write_text(f'#line 1 "{source}"\n{text}')
        objects.append(copy.with_suffix(".o"))
        checks = CHECKS if source.suffix == ".cu" else ["-O2"] if source.parent == HERE else []
        _run([COMPILER, *FLAGS, *checks, *(f"-I{i}" for i in includes), "-c", copy, "-o", objects[-1]])
    paths = [f"-L{p}" for p in cpp_extension.library_paths("cpu")]
    temporary = library.with_suffix(".part")
    _run([COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *paths, "-ltorch", "-ltorch_cpu", "-ldl", "-o", temporary])
    temporary.rename(library)


def _run(command: list) -> None:
    built = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert built.returncode == 0, f"{' '.join(map(str, command))}\n{built.stderr}"
