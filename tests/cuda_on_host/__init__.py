"""Runs the CUDA kernels of cuda_ops/ on the CPU, where there is no GPU and no CUDA toolkit.

`load(folder, "sparse")` compiles cuda_ops/sparse/cuda_*.{cu,cpp}, both kernels and operators, with g++ for an emulation
of CUDA: include/ has the headers, runtime.h says how it works and what it reports. The operators are registered as
`torch.ops.timm_dynamic_on_host.*` and take CPU tensors. What a test needs of it:

    pytestmark = cuda_on_host.needs_compiler
    operators = cuda_on_host.operators("dynamic_filter")  # a fixture


    def test(operators):
        operators.dynamic_filter(x, filters, channel_filter, 3, "mul", 1, 1, 1, 1, seed=2)
"""

import ctypes
import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cuda_ops"
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="no g++ on Linux")
NAMESPACE = "timm_dynamic_on_host"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-DUSE_CUDA"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall", "-Wno-unknown-pragmas"]
# With these every access to memory is a call of a function of memory.cpp.
CHECKS = ["-fsanitize=kernel-address", "-fsanitize=alignment", "-D__CUDACC__", "-include", "cuda_runtime.h"]
CHECKS += ["--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=0", "--param=asan-globals=1"]


@functools.cache  # test files share it
class Operators:
    """Each operator as an attribute: a function that runs it and raises `RuntimeError` with what a GPU would not do."""

    def __init__(self, library: Path, names: tuple[str, ...]):
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_on_host_error.restype = ctypes.c_char_p
        for name in names:
            schema = str(getattr(torch.ops.timm_dynamic, name).default._schema).removeprefix("timm_dynamic::")
            torch.library.define(f"{NAMESPACE}::{name}", schema.removeprefix(name))
            setattr(self, name, functools.partial(self._run, getattr(torch.ops, NAMESPACE), name))

    def _run(self, operators, name: str, *args, seed: int = 0, processors: int = 4):
        """`seed` decides about the order of threads and blocks: 0 ascending, 1 descending, else at random.

        With an even one, each warp runs as far as it can before the next does; with an odd one, warps take turns.
        """
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


def operators(name: str):
    """A fixture: the `Operators` of cuda_ops/`name`, compiled once a test run."""

    @pytest.fixture(scope="session")
    def operators(tmp_path_factory):
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent  # that of all workers
        return load(folder / "cuda_on_host", name)

    return operators


def load(folder: Path, name: str, sources: Iterable[Path] | None = None) -> Operators:
    """Compiles what cuda_ops/`name` has, or other sources, into `folder`, unless that was done before."""
    sources = list(sources or sorted((KERNELS / name).glob("cuda_*.c*")))
    library = folder / f"{name}_on_host.so"
    names = tuple(name for p in sources for name in re.findall(r'm\.impl\("(\w+)"', p.read_text()))
    folder.mkdir(exist_ok=True)
    with _absent(library) as missing:
        if missing:
            objects = [_compile(folder, source) for source in (*sources, *sorted(HERE.glob("*.cpp")))]
            torch_libraries = [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu"]
            _run(COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *torch_libraries, "-ldl", "-o", missing)
    return Operators(library, names)


@contextmanager
def _absent(path: Path) -> Iterator[Path | None]:
    """Where to write `path`, or None if it exists: of the processes of pytest-xdist, one writes it."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary = None if path.exists() else path.with_suffix(".part")
        yield temporary
        if temporary:
            temporary.rename(path)


def _compile(folder: Path, source: Path) -> Path:
    """The object file of a source, `extern __shared__` and the registration as the emulation has them."""
    shared = r"extern __shared__ (?:(?:__align__|alignas)\(\d+\) )?(\w[\w ]*) (\w+)\[\];"
    text = re.sub(shared, r"\1* const \2 = static_cast<\1*>(cuda_on_host::dynamic_shared());", source.read_text())
    text = text.replace("LIBRARY_IMPL(timm_dynamic, CUDA, m)", f"LIBRARY_IMPL({NAMESPACE}, CPU, m)")
    copy = folder / f"{source.parent.name}_{source.stem}_{source.suffix[1:]}.cpp"
    includes = (f"-I{i}" for i in (HERE, HERE / "include", KERNELS, TORCH / "include"))
    with _absent(copy.with_suffix(".o")) as missing:
        if missing:
            copy.write_text(f'#line 1 "{source}"\n{text}')
            flags = FLAGS + CHECKS if source.suffix == ".cu" else FLAGS
            _run(COMPILER, *flags, *includes, "-c", copy, "-o", missing)
    return copy.with_suffix(".o")


def _run(*command: str | Path) -> None:
    built = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert built.returncode == 0, f"{' '.join(map(str, command))}\n{built.stderr}"
