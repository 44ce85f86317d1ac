"""Builds the optional kernel binaries; everything else is in pyproject.toml.

`TIMM_DYNAMIC_CUDA=0` leaves the CUDA binary out, `=1` makes its failure an error; by default it is built where a CUDA
toolkit is found. `TORCH_CUDA_ARCH_LIST` overrides the GPU architectures.
"""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

# The LibTorch stable ABI of torch 2.11: one binary serves every later torch and every Python.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
SANITIZED = "-fsanitize" in os.environ.get("CFLAGS", "")  # `make sanitize`: reports should name lines
CXX_FLAGS = ["-O1" if SANITIZED else "-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++20", "--threads=2", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def say(message: str) -> None:
    print(f"timm-dynamic: {message}", file=sys.stderr)


def build_id(sources: list[str]) -> str:
    """Of the sources and the headers that they include: measurements of kernels are of one (ops/records.py)."""
    found, todo = set(), [Path(source) for source in sources]
    while todo:
        path = todo.pop()
        found.add(path)
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        included = [folder / name for name in names for folder in (path.parent, Path("cuda_ops"))]
        todo += [header for header in included if header.exists() and header not in found]
    return hashlib.sha1(b"".join(path.read_bytes() for path in sorted(found))).hexdigest()


def extension(name: str, sources: list[str], device: str, libraries: list[str], **compile_args) -> Extension:
    return Extension(
        f"timm_dynamic.{name}",
        sources,
        include_dirs=[str(Path("cuda_ops").resolve()), *cpp_extension.include_paths(device)],
        library_dirs=cpp_extension.library_paths(device),
        libraries=["torch", "torch_cpu", *libraries],
        depends=[str(p) for p in Path("cuda_ops").rglob("*.h")],
        extra_compile_args=compile_args,
        extra_link_args=[
            "-Wl,--exclude-libs,ALL",
            f"-Wl,--build-id=0x{build_id(sources)}",
            *([] if SANITIZED else ["-s"]),
        ],
        language="c++",
    )


def cuda_problem() -> str | None:
    """Why the CUDA binary cannot be built, or None."""
    if os.environ.get("TIMM_DYNAMIC_CUDA") == "0":
        return "TIMM_DYNAMIC_CUDA=0"
    home = os.environ.get("CUDA_HOME") or cpp_extension.CUDA_HOME
    if not home:
        return "no CUDA toolkit found (set CUDA_HOME)"
    needed = ("bin/nvcc", "include/cuda_runtime.h")  # `nvcc` on PATH may be a wrapper
    homes = [h for h in (home, "/usr/local/cuda") if all((Path(h) / file).exists() for file in needed)]
    if not homes:
        return f"no {' and '.join(needed)} below CUDA_HOME={home}: set CUDA_HOME to the toolkit's folder"
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = homes[0]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return None


def extensions() -> list[Extension]:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        say(f"no C++ compiler ({compiler}): installing without kernels; the slower pure-PyTorch code serves instead")
        return []
    sources = sorted(str(p) for p in Path("cuda_ops").rglob("*.cpp") if not p.name.startswith("cuda_"))
    found = [extension("_cpu", sources, "cpu", [], cxx=CXX_FLAGS)]
    problem = cuda_problem()
    if problem is None:
        say(f"building the CUDA kernels with {os.environ['CUDA_HOME']} for {os.environ['TORCH_CUDA_ARCH_LIST']}")
        libraries = ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]
        sources = sorted(str(p) for p in Path("cuda_ops").rglob("cuda_*.c*"))  # no two of one folder and stem
        flags = {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS}
        found.append(extension("_cuda", sources, "cuda", libraries, **flags))
    elif os.environ.get("TIMM_DYNAMIC_CUDA") == "1":
        raise SystemExit(f"timm-dynamic: {problem}; or leave the CUDA kernels out with TIMM_DYNAMIC_CUDA=0")
    else:
        say(f"no CUDA kernels: {problem}")
    return found


class BuildKernels(cpp_extension.BuildExtension):
    """Builds each binary on its own, and installs without those that fail unless they were asked for."""

    def run(self) -> None:
        self._forget()
        super().run()

    def _forget(self) -> None:
        """An old binary would pass for one that is not built now, or cannot be."""
        for name in ("_cpu", "_cuda"):
            Path(self.get_ext_fullpath(f"timm_dynamic.{name}")).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        self._forget()  # in the folder of the build, as `run` may copy from there
        wanted, self.extensions = self.extensions, []
        for ext in wanted:
            self.extensions = [ext]
            try:
                super().build_extensions()
            except Exception as error:
                if ext.name.endswith("_cuda") and os.environ.get("TIMM_DYNAMIC_CUDA") == "1":
                    raise
                say(f"could not build {ext.name}, going on without it: {error}")
                ext.optional = True  # so that nobody looks for its file later
        self.extensions = [ext for ext in wanted if Path(self.get_ext_fullpath(ext.name)).exists()]


class AnyPythonWheel(bdist_wheel):
    """The binaries are loaded by torch, not imported: the wheel fits any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


ext_modules = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass={
        "build_ext": BuildKernels.with_options(no_python_abi_suffix=True),
        **({"bdist_wheel": AnyPythonWheel} if ext_modules else {}),
    },
)
