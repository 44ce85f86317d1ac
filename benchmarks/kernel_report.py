"""What each CUDA kernel of the compiled binary takes on each architecture: registers, shared memory, stack.

`python benchmarks/kernel_report.py [BINARY]` reads timm_dynamic/_cuda.so or the given file with cuobjdump (of the CUDA
toolkit, else Triton's) and writes results/cuda_kernels.json. No GPU is needed. What ptxas spills lies in the kernel's
stack frame: a kernel without one spills nothing.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from timm_dynamic.timing import environment

RESULT = Path(__file__).parent / "results" / "cuda_kernels.json"
FIELDS = {"registers": "REG", "shared": "SHARED", "stack": "STACK", "local": "LOCAL"}


def cuobjdump() -> str:
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found is None:
        import triton

        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found)


def output(*command: str, stdin: str | None = None) -> str:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace", check=True).stdout


def kernel_name(demangled: str) -> str:
    """`void timm_dynamic::(anonymous namespace)::gather<float, 3>(...)` -> `gather<float, 3>`."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for end, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:end]
            break
    return name.removeprefix("timm_dynamic::").replace("c10::", "").replace("timm_dynamic::", "")


def resources(binary: str) -> list[dict]:
    """A row a kernel and architecture."""
    rows, arch = [], ""
    for line in output(cuobjdump(), "-res-usage", binary).splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            rows.append({"kernel": found[1], "arch": arch})
        elif found := re.findall(r"(\w+):(\d+)", line) if "REG:" in line else None:
            rows[-1] |= {name: int(dict(found)[key]) for name, key in FIELDS.items()}
    names = output("c++filt", stdin="\n".join(row["kernel"] for row in rows)).splitlines()
    for row, name in zip(rows, names, strict=True):
        row["kernel"] = kernel_name(name)
    return sorted(rows, key=lambda row: (row["kernel"], int(row["arch"][3:])))


def main() -> None:
    binary = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1] / "timm_dynamic" / "_cuda.so")
    if not Path(binary).exists():
        sys.exit(f"kernel_report.py: no {binary}: `TIMM_DYNAMIC_CUDA=1 python setup.py build_ext --inplace` builds it")
    rows = resources(binary)
    versions = set(re.findall(r"Tool Version:\s*(.*)", output(cuobjdump(), "-elf", binary)))
    head = {
        "compiler": ", ".join(sorted(versions)),
        "ptx": sorted(set(re.findall(r"sm_\d+(?=\.ptx)", output(cuobjdump(), "-lptx", binary)))),
        "binary_bytes": Path(binary).stat().st_size,
        **{key: value for key, value in environment(torch.device("cpu")).items() if key in ("commit", "date")},
    }
    # A row a line: as indented JSON there would be five thousand.
    text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows)
    RESULT.write_text(text + "\n ]\n}\n")
    stacks = [row for row in rows if row["stack"] or row["local"]]
    print(f"{len(rows)} kernels, those of every architecture, in {RESULT}; {len(stacks)} have a stack frame")


if __name__ == "__main__":
    main()
